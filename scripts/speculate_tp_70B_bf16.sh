#!/bin/sh
# Llama-2-70B in bfloat16 on 8 ranks, drafted by Llama-2-7B in int8, as gpt-fast's script of this name.
# Needs: as many GPUs as RANKS (8), together 140 GB, and 7 GB for the draft. RANKS=2 takes two GPUs of 80 GB.
# MODEL_REPO, DRAFT_MODEL_REPO: other models below checkpoints/ (CHECKPOINTS). More flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
. scripts/speculate.sh
target=$(weights "${MODEL_REPO:-meta-llama/Llama-2-70b-chat-hf}" bf16)
draft=$(weights "${DRAFT_MODEL_REPO:-meta-llama/Llama-2-7b-chat-hf}" int8)
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "${RANKS:-8}" -m gpt_fast.generate \
    --checkpoint_path "$target" --draft_checkpoint_path "$draft" --speculate_k 5 --prompt "${PROMPT:-def quicksort(arr):}" \
    --max_new_tokens 200 --num_samples 50 --temperature 0 "$@"
