#!/bin/sh
# Llama-2-70B in bfloat16 over several GPUs, drafted by Llama-2-7B. Extra flags go to gpt_fast.generate.
set -eu
cd "$(dirname "$0")/.."
TARGET=${CHECKPOINT:-checkpoints/meta-llama/Llama-2-70b-chat-hf}
DRAFT=${DRAFT_CHECKPOINT:-checkpoints/meta-llama/Llama-2-7b-chat-hf}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node="${RANKS:-8}" -m gpt_fast.generate \
    --checkpoint_path "$TARGET" --draft_checkpoint_path "$DRAFT" \
    --speculate_k 5 --prompt "${PROMPT:-Hi my name is}" --max_new_tokens 200 --num_samples 50 --temperature 0 --compile "$@"
