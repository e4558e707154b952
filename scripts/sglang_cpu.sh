#!/usr/bin/env bash
# Makes an environment in which stock SGLang runs without a GPU, for the tests of target.engine=sglang and sglang_server, and
# prints its folder. It lies outside the checkout, keyed by what it pins. 2.4 GB of disk, about three minutes.
#
#   bash scripts/sglang_cpu.sh            build it where it is missing, and install this checkout's package into it
#   bash scripts/sglang_cpu.sh --where    print its folder only
set -euo pipefail
cd "$(dirname "$0")/.."

# SGLang's own requirements bring GBs of CUDA along, so nothing of it is left to pip to resolve.
sglang="sglang==0.5.23 apache-tvm-ffi==0.1.11 compressed-tensors xgrammar==0.2.7 gguf sentencepiece soundfile"
needs="transformers==5.19.0 psutil pyzmq pydantic fastapi uvicorn uvloop aiohttp requests orjson msgspec python-multipart packaging
  pillow setproctitle pybase64 xxhash einops prometheus-client partial_json_parser tqdm interegular regex tiktoken IPython openai
  dill loguru jsonschema cffi safetensors setuptools>=77"
ours="lightning hydra-core jinja2 matplotlib"   # what this package needs
mooncake="mooncake-transfer-engine-non-cuda==0.3.13.post1"

python=$(command -v python3.11 || command -v python3)
key=$({ "$python" -V; echo "torch==2.13.0 numpy $needs $ours $sglang $mooncake"; } | sha256sum | cut -c1-16)
venv="${XDG_CACHE_HOME:-$HOME/.cache}/lightning-dataflow/sglang-$key"
if [ "${1:-}" = "--where" ]; then
  echo "$venv"
  exit
fi

if [ ! -e "$venv/installed" ]; then
  echo "installing into $venv" >&2
  [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -q -c constraints.txt torch numpy
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install -q -c constraints.txt $needs $ours
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install -q --no-deps $sglang $mooncake
  touch "$venv/installed"
fi

# Every process of a server needs the stand-ins for packages without CPU builds; a .pth line imports them at its start.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp tests/sglang/sglang_cpu_stand_ins.py "$site/"
echo "import sglang_cpu_stand_ins" > "$site/sglang_cpu_stand_ins.pth"
"$venv/bin/python" -m pip install -q --no-deps --no-build-isolation -e .  # the environment may point at another checkout
echo "$venv"
