#!/usr/bin/env bash
# Removes what the other scripts made: builds, caches, and the environments they created.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
find isojob tests examples bench fuzz -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
for dir in "$venv" "$venv"-[0-9]* "$venv-vm"; do
    if [[ -f $dir/pyvenv.cfg ]]; then rm -rf "$dir"; fi
done
