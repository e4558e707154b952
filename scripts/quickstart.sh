#!/usr/bin/env bash
# Sets up, then trains an EAGLE3 draft for SmolLM2 on real conversations. Further arguments are Hydra overrides.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python train.py topology=online experiment=quickstart "$@"
