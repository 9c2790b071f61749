#!/usr/bin/env bash
# fuzz.sh [SECONDS]: runs each fuzzer of fuzz/ for so long (60 s); each reads ISOJOB_FUZZ_SECONDS.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install_checkout test
export ISOJOB_FUZZ_SECONDS=${1:-60}
shopt -s nullglob
fuzzers=(fuzz/fuzz_*.py)
((${#fuzzers[@]})) || die "fuzz/ has no fuzz_*.py"
for fuzzer in "${fuzzers[@]}"; do
    printf '==> %s\n' "$fuzzer"
    "$venv/bin/python" "$fuzzer"
done
