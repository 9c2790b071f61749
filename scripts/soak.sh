#!/usr/bin/env bash
# soak.sh [FUZZ-SECONDS]: the tests that go by rounds in full (500 kills, 1,000 and more cancels,
# 10,000 known verdicts, each system call made to fail), each fuzzer for so long (600 s), and with
# TEST_VM (see test-vm.sh) 500 kills on cgroup v2, as root and as uid 1000. About an hour and a half.
# ISOJOB_TEST_SEED repeats the tests of a run; the seeds are printed.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
with_debian strace strace
with_debian debootstrap debootstrap
export ISOJOB_TEST_WHOLE=1
wheel=$(scripts/wheel.sh)
scripts/test-native.sh "$(default_python)" "$wheel" -s -o faulthandler_timeout=7200 \
    tests/integration/test_{kills,cancels,verdicts,exhaustion,lifecycle,injection,attack,image_tools}.py
scripts/fuzz.sh "${1:-600}"
if [[ -n ${TEST_VM:-} ]]; then
    scripts/test-vm.sh --prepare "$wheel"
    for who in root user; do
        ISOJOB_TEST_ROUNDS=125 scripts/test-vm.sh "$who" "$wheel" -s tests/integration/test_kills.py
    done
fi
