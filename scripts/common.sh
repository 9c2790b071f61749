# Sourced by the other scripts: strictness, where things are, how an environment is filled.
# shellcheck shell=bash
set -euo pipefail

# Tests run as another uid too, which must be able to read what is installed here.
umask 022

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# shellcheck disable=SC2034  # used by the scripts that source this
venv=$(realpath -ms "${ISOJOB_VENV:-$root/.venv}")

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# default_python: the interpreter of the main environment.
default_python() {
    if [[ -n ${PYTHON:-} ]]; then
        printf '%s\n' "$PYTHON"
        return
    fi
    local found
    found=$(scripts/pythons.sh)
    [[ -n $found ]] || die "no Python of a supported version was found (see pyproject.toml)"
    head -n 1 <<<"$found" | cut -f 2
}

# has_apt: whether this is a Debian and we are root.
has_apt() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null
}

# apt_install PACKAGE
apt_install() {
    printf 'installing %s\n' "$1" >&2
    {
        # Lists that are fresh enough for one package are for the next.
        [[ -n ${apt_updated:-} ]] || apt-get update -qq && apt_updated=1
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"
    } >&2
}

# with_debian PROGRAM PACKAGE: installs what a test needs, where we can; without it that test is
# skipped. A program that must not be just anywhere on PATH is named by its path.
with_debian() {
    command -v "$1" >/dev/null || ! has_apt || apt_install "$2" ||
        printf 'cannot install %s: what needs %s does not run\n' "$2" "$1" >&2
}

# install_checkout EXTRAS: the checkout, as a user would install it, into the main environment.
install_checkout() {
    scripts/venv.sh "$(default_python)" "$venv"
    "$venv/bin/python" -m pip install --quiet ".[$1]"
}
