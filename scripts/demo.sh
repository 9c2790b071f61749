#!/usr/bin/env bash
# Grades the HumanEval reference solutions in isolated jobs.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install_checkout cli,demo
exec "$venv/bin/python" examples/grade_humaneval.py "$@"
