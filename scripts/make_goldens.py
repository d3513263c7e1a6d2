"""Make tests/data/goldens.json: greedy tokens of the default model by an independent implementation.

    python scripts/make_goldens.py --gguf build/downloads/SmolLM2-135M-Instruct.Q4_1.gguf

transformers reads the same GGUF and decodes in float32 with its own tokenizer, cache and attention; nothing of
gpt_fast is imported. The file keeps the gap between the two best logits of every step, so that a test that fails
can tell a near tie from a fault.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path

import torch
import transformers

NEW_TOKENS = 64
TOPIC = "types"  # a long page of Python's own manual, for the prompts of hundreds of tokens


def prompts() -> dict[str, str]:
    manual = pydoc_data.topics.topics[TOPIC]
    return {
        "short": "The capital of France is",
        "chat": "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
        "story": "Once upon a time, in a village between two rivers, there lived an old clockmaker who",
        "code": 'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
        "chinese": "从前有一座山，山上有一座庙，庙里有一个老和尚在讲故事。他说：",
        "emoji": "Translate to words: 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 means",
        "manual-400": manual[:1800],
        "manual-1500": manual[1800:8040],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("tests/data/goldens.json"))
    args = parser.parse_args()
    directory, name = str(args.gguf.parent), args.gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32).eval()
    rows = {key: golden(model, tokenizer, text) for key, text in prompts().items()}
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32, greedy"
    args.out.write_text(json.dumps({"made_by": made_by, "prompts": rows}, ensure_ascii=False, indent=1) + "\n")


@torch.inference_mode()
def golden(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> dict:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cache, tokens, gaps = None, [], []
    step = torch.tensor([ids])
    for _ in range(NEW_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(round(float(best.values[0] - best.values[1]), 4))
        step = best.indices[:1][None]
    print(f"{len(ids):5} prompt tokens, smallest gap {min(gaps)}: {tokenizer.decode(tokens)[:70]!r}")
    return {"text": text, "prompt": ids, "tokens": tokens, "gaps": gaps}


if __name__ == "__main__":
    main()
