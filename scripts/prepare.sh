#!/usr/bin/env bash
# Download, convert and quantize one model: scripts/prepare.sh meta-llama/Llama-2-7b-chat-hf
# Leaves checkpoints/$MODEL_REPO/model.safetensors and model_int8.safetensors, of which `make serve MODEL=$MODEL_REPO`
# takes the second. HF_TOKEN opens gated repositories.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL_REPO=${1:?"usage: scripts/prepare.sh MODEL_REPO, e.g. openlm-research/open_llama_7b"}
PYTHON=${PYTHON:-python}

"$PYTHON" -m gpt_fast pull "$MODEL_REPO:int8" --out_dir "checkpoints/$MODEL_REPO"
