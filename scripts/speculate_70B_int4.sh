#!/bin/sh
# Llama-2-70B in int4, drafted by Llama-2-7B in int4. Extra flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
TARGET=${CHECKPOINT:-checkpoints/meta-llama/Llama-2-70b-chat-hf/model_int4.g32.safetensors}
DRAFT=${DRAFT_CHECKPOINT:-checkpoints/meta-llama/Llama-2-7b-chat-hf/model_int4.g32.safetensors}
exec "${PYTHON:-python}" -m gpt_fast.generate \
    --checkpoint_path "$TARGET" --draft_checkpoint_path "$DRAFT" \
    --speculate_k 4 --prompt "${PROMPT:-Hi my name is}" --max_new_tokens 200 --num_samples 50 --temperature 0 --compile "$@"
