#!/usr/bin/env bash
# soak.sh [FUZZ-SECONDS]: the tests that go by rounds in full (500 kills, 1,000 and more cancels,
# 10,000 known verdicts, each system call made to fail), and each fuzzer for so long (600 s). About an
# hour and a half. ISOJOB_TEST_SEED repeats a run; the seeds are printed.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
with_debian strace strace
with_debian debootstrap debootstrap
export ISOJOB_TEST_WHOLE=1
wheel=$(scripts/wheel.sh)
scripts/test-native.sh "$(default_python)" "$wheel" -s -o faulthandler_timeout=7200 \
    tests/integration/test_{kills,cancels,verdicts,exhaustion,lifecycle,injection,attack,image_tools}.py
scripts/fuzz.sh "${1:-600}"
