#!/usr/bin/env bash
# test-user.sh PYTHON WHEEL [PYTEST-ARGUMENT...]: as root on a cgroup v1 kernel, runs integration
# tests as uid 1000, which owns a cgroup in each hierarchy and no subordinate ids.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# >= 2)) || die "usage: test-user.sh PYTHON WHEEL [PYTEST-ARGUMENT...]"
python=$1 wheel=$2
shift 2
(($#)) || set -- tests/integration/test_{run,isolation,limits,process,group,session,layers,writable,injection,attack}.py

dir=$venv-user
scripts/environment.sh "$python" "$dir" "$wheel"

# Neither the checkout nor the user's home need be open to that uid.
copy=$(mktemp -d)
made=()
cleanup() {
    local path
    rm -rf "$copy"
    for path in "${made[@]}"; do
        find "$path" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
}
trap cleanup EXIT
cp -r pyproject.toml tests seccomp_profiles examples "$copy"
chown -R 1000:1000 "$copy"

# One line is "number:controllers:path"; a controller's hierarchy is mounted by that name.
while IFS=: read -r number controllers path; do
    [[ $number != 0 && $controllers != name=* ]] || continue
    above=/sys/fs/cgroup/$controllers$path
    [[ -d $above ]] || die "the hierarchy of $controllers is not below /sys/fs/cgroup"
    own=$above/isojob-test-user-$$
    mkdir "$own"
    made+=("$own")
    if [[ $controllers == *cpuset* ]]; then
        for file in cpuset.cpus cpuset.mems; do
            cat "$above/$file" >"$own/$file"
        done
    fi
    chown -R 1000:1000 "$own"
done </proc/self/cgroup

export PATH=$dir/bin:$PATH VIRTUAL_ENV=$dir PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 HOME=$copy
cd "$copy"
# The processes of the tests alone move there: this shell is to remove the directories afterwards.
(
    for path in "${made[@]}"; do
        echo "$BASHPID" >"$path/cgroup.procs"
    done
    exec setpriv --reuid 1000 --regid 1000 --clear-groups \
        "$dir/bin/python" -m pytest -p no:cacheprovider "$@"
)
