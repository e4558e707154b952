#!/usr/bin/env bash
# Sets up, then checks style and types and runs tests. Each tier holds the one before; further arguments go to pytest.
#
#   bash scripts/test.sh fast       unit tests that neither run a command nor train: the loop while writing code
#   bash scripts/test.sh            the default suite: all but what is slow
#   bash scripts/test.sh ci         and what is slow, among it every command of the README
#   bash scripts/test.sh nightly    and all products of strategies and settings, chaos, and long runs
#   bash scripts/test.sh engines    tests against SGLang and vLLM alone; .ci/engines makes their environments
set -euo pipefail
cd "$(dirname "$0")/.."

tier=default
case "${1:-}" in fast | default | ci | nightly | engines) tier=$1; shift ;; esac
folders=tests
spread="loadfile --no-loadscope-reorder"  # tests of a file may share a run that one of them made
case $tier in
  fast) marked="not slow and not integration"; folders="tests/test_lint.py tests/golden tests/unit"; spread=worksteal ;;
  default) marked="not slow" ;;
  ci) marked="not nightly and not engine" ;;
  nightly) marked="not engine" ;;
  engines) marked="engine" ;;
esac

bash scripts/setup.sh
# Two tests at a time, each process with one thread: threads that wait for a core slow all others down. `exec`, so that
# a signal to this script ends the tests; these end what they have started.
export OMP_NUM_THREADS=1
# shellcheck disable=SC2086
exec .venv/bin/python -m pytest -n 2 --dist $spread -m "$marked" --durations=5 --durations-min=1 $folders "$@"
