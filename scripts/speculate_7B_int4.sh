#!/bin/sh
# CodeLlama-7B in int4, drafted by TinyLlama-1.1B in int4, as gpt-fast's script of this name.
# Needs: 6 GB of a GPU, or of RAM. MODEL_REPO, DRAFT_MODEL_REPO: other models below checkpoints/ (CHECKPOINTS).
# More flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
. scripts/speculate.sh
target=$(weights "${MODEL_REPO:-codellama/CodeLlama-7b-Python-hf}" int4)
draft=$(weights "${DRAFT_MODEL_REPO:-PY007/TinyLlama-1.1B-intermediate-step-480k-1T}" int4)
exec "$PYTHON" -m gpt_fast.generate \
    --checkpoint_path "$target" --draft_checkpoint_path "$draft" --speculate_k 5 --prompt "${PROMPT:-Hi my name is}" \
    --max_new_tokens 200 --num_samples 50 --temperature 0 $COMPILE "$@"
