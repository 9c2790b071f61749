#!/usr/bin/env bash
# Measures against bare process creation, interleaved in one run; the numbers are ratios.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install_checkout bench
exec "$venv/bin/python" bench/run.py "$@"
