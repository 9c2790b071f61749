#!/usr/bin/env bash
# Rewrites the sources as scripts/lint.sh wants them.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
scripts/venv.sh "$(default_python)" "$venv"
"$venv/bin/python" -m pip install --quiet "$(sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)" \
    "$(sed -n 's/.*"\(clang-format==[^"]*\)".*/\1/p' pyproject.toml)"
"$venv/bin/ruff" check --fix-only .
"$venv/bin/ruff" format .
"$venv/bin/clang-format" -i isojob/native/*.[ch] isojob/native/warm/*.c
