# Sourced after common.sh by scripts that run something beside themselves: $work, a directory, and
# beside[NAME], the process group of each. Both go when the script ends, however that is.
# shellcheck shell=bash
work=$(mktemp -d)
declare -A beside=()
cleanup() {
    local group
    trap '' HUP INT TERM  # make sends what it gets once more, which would end this half way
    # Whole process groups: a guest has children of its own.
    for group in "${beside[@]}"; do
        kill -- "-$group" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap cleanup EXIT
