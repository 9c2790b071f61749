#!/usr/bin/env bash
# test-native.sh PYTHON WHEEL [PYTEST-ARGUMENT...]: tests the wheel on this machine's kernel, in an
# environment of its own. Without arguments for pytest: the unit and the integration tests.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# >= 2)) || die "usage: test-native.sh PYTHON WHEEL [PYTEST-ARGUMENT...]"
python=$1 wheel=$2
shift 2
(($#)) || set -- tests/unit tests/integration

dir=$venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
scripts/environment.sh "$python" "$dir" "$wheel"

# Safe path: neither pytest nor what it starts may import the checkout instead of the wheel.
export PATH=$dir/bin:$PATH VIRTUAL_ENV=$dir PYTHONSAFEPATH=1
exec "$dir/bin/python" -m pytest "$@"
