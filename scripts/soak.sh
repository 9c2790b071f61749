#!/usr/bin/env bash
# soak.sh [FUZZ-SECONDS]: the tests that go by rounds in full (500 kills, 1,000 and more cancels,
# 10,000 known verdicts, each system call made to fail, as uid 1000 too) and beside them each fuzzer
# for so long (600 s); with TEST_VM (see test-vm.sh), 500 kills on cgroup v2, as root and, beside it, as
# uid 1000. An hour. A part that fails does not hide the next.
# ISOJOB_TEST_SEED repeats the tests of a run; the seeds are printed.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
with_debian strace strace
with_debian debootstrap debootstrap
with_debian umoci umoci
with_debian skopeo skopeo
with_debian musl-gcc musl-tools
. "$(dirname "${BASH_SOURCE[0]}")/beside.sh"

failed=()
# begin NAME COMMAND...: runs it beside what follows, in a process group of its own.
begin() {
    local name=$1
    shift
    set -m
    "$@" >"$work/$name" 2>&1 </dev/null &
    set +m
    beside[$name]=$!
}
# await NAME: prints what it has said, when it is done.
await() {
    wait "${beside[$1]}" || failed+=("$1")
    unset "beside[$1]"
    printf '==> %s\n' "$1"
    cat "$work/$1"
}

export ISOJOB_TEST_WHOLE=1
wheel=$(scripts/wheel.sh)
begin fuzzers scripts/fuzz.sh "${1:-600}"
scripts/test-native.sh "$(default_python)" "$wheel" -s -o faulthandler_timeout=7200 \
    tests/integration/test_{kills,cancels,verdicts,exhaustion,lifecycle,injection,attack,image_tools}.py ||
    failed+=(tests)
# The guests begin beside what is left of the fuzzers.
parts=(fuzzers)
if [[ -n ${TEST_VM:-} ]]; then
    if scripts/test-vm.sh --prepare "$wheel"; then
        for who in root user; do
            ISOJOB_TEST_ROUNDS=125 begin "kills in the guest as $who" \
                scripts/test-vm.sh "$who" "$wheel" -s tests/integration/test_kills.py
            parts+=("kills in the guest as $who")
        done
    else
        failed+=("preparing the guests")
    fi
fi
# An ordinary user's pool starts by calls of its own; on v1, as in test.sh.
if [[ $(id -u) == 0 && ! -e /sys/fs/cgroup/cgroup.controllers ]]; then
    scripts/test-user.sh "$(default_python)" "$wheel" -s -o faulthandler_timeout=7200 \
        tests/integration/test_injection.py || failed+=("tests as uid 1000")
fi
for part in "${parts[@]}"; do
    await "$part"
done
((${#failed[@]} == 0)) || die "failed: ${failed[*]}"
