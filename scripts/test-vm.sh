#!/usr/bin/env bash
# test-vm.sh root|user|systemd WHEEL [PYTEST-ARGUMENT...]: runs the integration tests on the cgroup
# v2 kernel behind $TEST_VM: as root, as uid 1000 that owns its cgroup, or as uid 1000 in a unit
# that systemd delegated. Before, once: test-vm.sh --prepare WHEEL, which makes their environment.
# $TEST_VM is the beginning of a command line:
#     $TEST_VM [-u UID] [--systemd] -e NAME=VALUE -- COMMAND...
# The guest sees this machine's files, keeps no change to them, and is about 20 times slower;
# tests find that number in ISOJOB_TEST_SLOWNESS. ISOJOB_TEST_ROUNDS, _SEED and _BACKEND pass on.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# >= 2)) || die "usage: test-vm.sh root|user|systemd WHEEL [PYTEST-ARGUMENT...]"
[[ -n ${TEST_VM:-} ]] || die "TEST_VM is not set"
who=$1 wheel=$2
shift 2

dir=$venv-vm
if [[ $who == --prepare ]]; then
    # An interpreter below root's home is closed to uid 1000, so the system's comes first.
    exec scripts/environment.sh "$(scripts/pythons.sh | head -n 1 | cut -f 2)" "$dir" "$wheel"
fi
# The guest is slow. By default it runs what meets the other kernel, each as one user and on one event
# loop; what is the same on every kernel, the API above, runs there if tests/integration is asked for.
# What systemd does otherwise is the cgroup that a job starts from.
if (($# == 0)); then
    case $who in
    root) set -- attack disk_io hosts kills lifecycle limits run sweep template_hostile ;;
    user) set -- attack cancels exhaustion faults isolation kills layers session verdicts writable ;;
    systemd) set -- run ;;
    esac
    set -- "${@/#/tests/integration/test_}"
    set -- "${@/%/.py}" tests/integration/test_doctor.py::test_this_host_passes
    # That the attacks tell without a protection is seen as uid 1000.
    [[ $who != root ]] ||
        set -- "$@" tests/integration/test_python.py::test_{verdicts,a_cell_like_any_other,dead_template} \
            --deselect=tests/integration/test_attack.py::test_without_{a_protection,the_filter,private_views}_they_tell
fi

case $who in
root) options=() backend=asyncio ;;
user) options=(-u 1000) backend=trio ;;
systemd) options=(-u 1000 --systemd) backend=trio ;;
*) die "unknown user: $who" ;;
esac

export ISOJOB_TEST_BACKEND=${ISOJOB_TEST_BACKEND-${backend:-}}

for name in ISOJOB_TEST_ROUNDS ISOJOB_TEST_SEED ISOJOB_TEST_BACKEND; do
    [[ -z ${!name:-} ]] || options+=(-e "$name=${!name}")
done

export PATH=$dir/bin:$PATH VIRTUAL_ENV=$dir
# shellcheck disable=SC2086  # a command with its options
exec $TEST_VM "${options[@]}" \
    -e PYTHONSAFEPATH=1 -e PYTHONDONTWRITEBYTECODE=1 -e ISOJOB_TEST_SLOWNESS=20 \
    -- "$dir/bin/python" -m pytest -p no:cacheprovider --durations=10 "$@"
