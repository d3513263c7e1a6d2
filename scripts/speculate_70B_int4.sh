#!/bin/sh
# Llama-2-70B in int4, drafted by Llama-2-7B in int4, as gpt-fast's script of this name.
# Needs: 48 GB of one GPU, or of RAM. MODEL_REPO, DRAFT_MODEL_REPO: other models below checkpoints/ (CHECKPOINTS).
# More flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
. scripts/speculate.sh
target=$(weights "${MODEL_REPO:-meta-llama/Llama-2-70b-chat-hf}" int4)
draft=$(weights "${DRAFT_MODEL_REPO:-meta-llama/Llama-2-7b-chat-hf}" int4)
exec "$PYTHON" -m gpt_fast.generate \
    --checkpoint_path "$target" --draft_checkpoint_path "$draft" --speculate_k 4 --prompt "${PROMPT:-def quicksort(arr):}" \
    --max_new_tokens 100 --num_samples 50 --temperature 0 $COMPILE "$@"
