#!/bin/sh
# CodeLlama-34B in bfloat16, drafted by CodeLlama-7B in int4. Extra flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
DIR=${CHECKPOINT_DIR:-checkpoints/codellama/CodeLlama-34b-Python-hf}
DRAFT=${DRAFT_CHECKPOINT:-checkpoints/codellama/CodeLlama-7b-Python-hf/model_int4.g32.safetensors}
exec "${PYTHON:-python}" -m gpt_fast.generate \
    --checkpoint_path "$DIR" --draft_checkpoint_path "$DRAFT" \
    --speculate_k 6 --prompt "${PROMPT:-def quicksort(arr):}" --max_new_tokens 200 --num_samples 50 --temperature 0 --compile "$@"
