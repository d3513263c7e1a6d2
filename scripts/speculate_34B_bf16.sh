#!/bin/sh
# CodeLlama-34B in bfloat16, drafted by CodeLlama-7B in int4, as gpt-fast's script of this name.
# Needs: 72 GB of one GPU, or of RAM. MODEL_REPO, DRAFT_MODEL_REPO: other models below checkpoints/ (CHECKPOINTS).
# More flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
. scripts/speculate.sh
target=$(weights "${MODEL_REPO:-codellama/CodeLlama-34b-Python-hf}" bf16)
draft=$(weights "${DRAFT_MODEL_REPO:-codellama/CodeLlama-7b-Python-hf}" int4)
exec "$PYTHON" -m gpt_fast.generate \
    --checkpoint_path "$target" --draft_checkpoint_path "$draft" --speculate_k 6 --prompt "${PROMPT:-def quicksort(arr):}" \
    --max_new_tokens 200 --num_samples 50 --temperature 0 $COMPILE "$@"
