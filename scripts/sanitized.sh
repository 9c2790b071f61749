#!/usr/bin/env bash
# sanitized.sh [PYTEST-ARGUMENT...]: jobs through a zygote, init and launcher built with ASan and
# UBSan. A finding ends the process that it is in, and so fails the test that meets it.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || set -- tests/integration/test_{run,limits,files,isolation,helpers,lifecycle,faults,kills,map,layers,writable,session}.py
python=$(default_python)
scripts/venv.sh "$python" "$venv"
rm -rf build/sanitized
"$venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir build/sanitized . \
    --config-settings=cmake.define.ISOJOB_SANITIZE=address,undefined
dir=$venv-sanitized
scripts/environment.sh "$python" "$dir" build/sanitized/*.whl
grep -q '"sanitize": "address,undefined"' "$dir"/lib/python3.*/site-packages/isojob/_libexec/build.json ||
    die "the build has no sanitizers"
export PATH=$dir/bin:$PATH VIRTUAL_ENV=$dir PYTHONSAFEPATH=1
exec "$dir/bin/python" -m pytest "$@"
