#!/usr/bin/env bash
# lint.sh [WHEEL]: style, types and size of everything in the repository. The environment needs the
# package's dependencies; a wheel at hand saves building one.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scripts/venv.sh "$(default_python)" "$venv"
"$venv/bin/python" -m pip install --quiet "${1:-.}[dev]"

failed=()
check() {
    "$venv/bin/python" -m "$@" || failed+=("$1")
}

# mypy takes a folder without a Python file for a mistake.
sources=()
for dir in isojob tests examples bench fuzz; do
    if [[ -d $dir && -n $(find "$dir" -name '*.py' -print -quit) ]]; then sources+=("$dir"); fi
done

check ruff check .
check ruff format --check .
check mypy "${sources[@]}"
check pyright --pythonpath "$venv/bin/python" "${sources[@]}"
"$venv/bin/clang-format" --dry-run --Werror isojob/native/*.[ch] isojob/native/warm/*.c fuzz/*.[ch] || failed+=(clang-format)

long=$(find isojob \( -name '*.py' -o -name '*.[ch]' \) -exec awk 'END { if (NR > 400) print FILENAME ": " NR " lines" }' {} \;)
if [[ -n $long ]]; then
    printf '%s\n' "$long" "a module has at most 400 lines: look for the seam" >&2
    failed+=(size)
fi

((${#failed[@]} == 0)) || die "failed: ${failed[*]}"
