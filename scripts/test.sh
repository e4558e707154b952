#!/usr/bin/env bash
# Sets up, then checks style and types and runs all tests but the slow ones (`-m slow`). Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
# Two files of tests at a time, with one thread each: threads that wait for a core slow all of them down.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # the long files come first
