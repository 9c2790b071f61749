#!/usr/bin/env bash
# sanitized.sh [PYTEST-ARGUMENT...]: jobs through a zygote, init and launcher built with ASan and
# UBSan, the one in warm interpreters as well. A finding ends the process that it is in, and so fails
# the test that meets it. On one backend, since the C is the same under both.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || set -- tests/integration/test_{run,limits,files,isolation,helpers,lifecycle,faults,kills,map,layers,writable,session,python,python_branches,python_hostile,template_hostile}.py
python=$(default_python)
scripts/venv.sh "$python" "$venv"
rm -rf build/sanitized
"$venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir build/sanitized . \
    --config-settings=cmake.define.ISOJOB_SANITIZE=address,undefined
dir=$venv-sanitized
scripts/environment.sh "$python" "$dir" build/sanitized/*.whl
for part in "$dir"/lib/python3.*/site-packages/isojob/_libexec/isojob-{zygote,warm.so}; do
    grep -q __asan_init "$part" && grep -q __ubsan_handle "$part" || die "$part has no sanitizers"
done
export PATH=$dir/bin:$PATH VIRTUAL_ENV=$dir PYTHONSAFEPATH=1
export ISOJOB_TEST_BACKEND=${ISOJOB_TEST_BACKEND-asyncio}
exec "$dir/bin/python" -m pytest "$@"
