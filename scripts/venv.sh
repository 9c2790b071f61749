#!/usr/bin/env bash
# venv.sh PYTHON DIR: makes a virtual environment with pip, if there is none yet. Debian splits the
# parts that `python3 -m venv` needs into a package that a fresh machine lacks.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# == 2)) || die "usage: venv.sh PYTHON DIR"
python=$1 dir=$2

usable() { "$dir/bin/python" -m pip --version >/dev/null 2>&1; }

try() {
    "$@" >"$log" 2>&1 && usable
}

with_apt() {
    [[ $python == /usr/bin/* ]] && has_apt || return 1
    apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" || return 1
    try "$python" -m venv --clear "$dir"
}

with_virtualenv() {
    "$python" -m pip install --quiet --target "$scratch/virtualenv" virtualenv || return 1
    PYTHONPATH=$scratch/virtualenv try "$python" -m virtualenv --clear "$dir"
}

usable && exit 0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log
try "$python" -m venv --clear "$dir" && exit 0
with_apt && exit 0
with_virtualenv >&2 && exit 0
cat "$log" >&2
die "$python cannot make a virtual environment; as root: apt-get install python3-venv"
