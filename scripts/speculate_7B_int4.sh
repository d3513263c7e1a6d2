#!/bin/sh
# Llama-2-7B in bfloat16, drafted by itself in int4. Extra flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
DIR=${CHECKPOINT_DIR:-checkpoints/meta-llama/Llama-2-7b-chat-hf}
exec "${PYTHON:-python}" -m gpt_fast.generate \
    --checkpoint_path "$DIR" --draft_checkpoint_path "$DIR/model_int4.g32.safetensors" \
    --speculate_k 5 --prompt "${PROMPT:-Hi my name is}" --max_new_tokens 200 --num_samples 50 --temperature 0 --compile "$@"
