#!/usr/bin/env bash
# wheel.sh [CONFIG=VALUE...]: builds the wheel into build/wheel/ and prints its path. The settings
# are scikit-build-core's, for example cmake.define.ISOJOB_WERROR=ON.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scripts/venv.sh "$(default_python)" "$venv"
rm -rf build/wheel
"$venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir build/wheel . "${@/#/--config-settings=}" >&2
printf '%s\n' "$root"/build/wheel/*.whl
