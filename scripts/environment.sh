#!/usr/bin/env bash
# environment.sh PYTHON DIR WHEEL: an environment with the wheel and what its tests need, and with
# none of the other tools. Prints nothing but problems.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# == 3)) || die "usage: environment.sh PYTHON DIR WHEEL"
python=$1 dir=$2 wheel=$3
scripts/venv.sh "$python" "$dir"
"$dir/bin/python" -m pip install --quiet "${wheel}[test]"
# The version stays the same while the code changes: pip would keep an older build.
"$dir/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
