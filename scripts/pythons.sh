#!/usr/bin/env bash
# Prints the interpreters of the versions that pyproject.toml's classifiers promise, one a line:
# version, tab, path. The system's python3 comes first, then the others in order. Looks on PATH and
# below pyenv's versions/, where an interpreter may be installed without being selected.
# With --missing: the promised versions that this machine does not have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mapfile -t versions < <(sed -n 's/.*"Programming Language :: Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml)

# A pyenv shim exists for versions that are not selected and fails then: only running it tells. The
# real path is printed, since a shim stops working where the environment is another.
real_path() {
    "$1" -I -c '
import os, sys
if "%d.%d" % sys.version_info[:2] == sys.argv[1]:
    print(os.path.realpath(sys.executable))
' "$2" 2>/dev/null
}

candidates() {
    printf '%s\n' /usr/bin/python3
    type -P -a "python$1" python3 || true
    compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1*/bin/python$1" || true
}

find_version() {
    local candidate path
    while read -r candidate; do
        [[ -x $candidate ]] || continue
        path=$(real_path "$candidate" "$1") || continue
        [[ -n $path ]] || continue
        printf '%s\t%s\n' "$1" "$path"
        return 0
    done < <(candidates "$1")
    return 1
}

found=()
missing=()
for version in "${versions[@]}"; do
    if line=$(find_version "$version"); then
        # What every user of this machine can read goes first: it is the one tested most widely.
        if [[ ${line#*$'\t'} == /usr/bin/* ]]; then found=("$line" ${found[@]+"${found[@]}"}); else found+=("$line"); fi
    else
        missing+=("$version")
    fi
done

if [[ ${1:-} == --missing ]]; then
    ((${#missing[@]} == 0)) || printf '%s\n' "${missing[@]}"
else
    ((${#found[@]} == 0)) || printf '%s\n' "${found[@]}"
fi
