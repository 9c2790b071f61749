#!/usr/bin/env bash
# analyse.sh: what three static analysers find in the native code: gcc's, clang-tidy, cppcheck.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
with_debian clang-tidy clang-tidy
with_debian cppcheck cppcheck
flags=(-std=c17 -D_GNU_SOURCE -Iisojob/native)
failed=()
for source in isojob/native/*.c isojob/native/warm/*.c; do
    gcc "${flags[@]}" -O2 -fanalyzer -Wall -Wextra -Werror -c -o /dev/null "$source" || failed+=("gcc $source")
done
for tool in clang-tidy cppcheck; do
    command -v "$tool" >/dev/null || die "$tool is not installed"
done
# Findings go to stdout; to stderr how many warnings were suppressed.
clang-tidy --quiet isojob/native/*.c isojob/native/warm/*.c -- "${flags[@]}" 2>/dev/null || failed+=(clang-tidy)
cppcheck --quiet --std=c11 -D_GNU_SOURCE -D__x86_64__ --enable=warning,performance,portability \
    --error-exitcode=1 --suppress=missingIncludeSystem isojob/native || failed+=(cppcheck)
((${#failed[@]} == 0)) || die "failed: ${failed[*]}"
