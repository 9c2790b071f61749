#!/usr/bin/env bash
# fuzz.sh [SECONDS]: runs each fuzzer of fuzz/ for so long (60 s), from what fuzz/corpus/ has on; what they
# find is in build/fuzz/. ISOJOB_FUZZ_SEED repeats a run; the seeds are printed. The
# one of the C side needs clang with its sanitizers.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
with_debian clang clang
# The runtime of the sanitizers is a package of its own, named after the version.
if command -v clang >/dev/null && [[ ! -e $(clang -print-file-name=libclang_rt.fuzzer-x86_64.a 2>/dev/null) ]]; then
    with_debian libclang-rt "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev"
fi
install_checkout test
export ISOJOB_FUZZ_SECONDS=${1:-60}
shopt -s nullglob
fuzzers=(fuzz/fuzz_*.py)
((${#fuzzers[@]})) || die "fuzz/ has no fuzz_*.py"
for fuzzer in "${fuzzers[@]}"; do
    printf '==> %s\n' "$fuzzer"
    "$venv/bin/python" "$fuzzer"
done
