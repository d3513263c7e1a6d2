"""Hugging Face transformers: eager bfloat16, dynamic cache, greedy, from the same GGUF's weights."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from gpt_fast.bench.peers import PeerOptions
from gpt_fast.bench.recorder import record
from gpt_fast.bench.sample import Case, Description, Sample, Unavailable

NAME = "transformers"


def load(options: PeerOptions) -> Transformers:
    return Transformers(options)


class Transformers:
    def __init__(self, options: PeerOptions) -> None:
        gguf = options.need_gguf(NAME)
        os.environ["TQDM_DISABLE"] = "1"  # of this process
        try:
            import transformers
        except ImportError:
            raise Unavailable(f"{NAME}: pip install transformers gguf") from None
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(options.threads)
        started = time.perf_counter()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        ).eval()
        weights = sum(p.nbytes for p in self.model.parameters())
        facts = {"transformers": transformers.__version__, "torch": torch.__version__, "dtype": "bfloat16"}
        self.description = Description(weights, options.kv_bytes(2), time.perf_counter() - started, facts)

    def describe(self) -> Description:
        return self.description

    def run(self, case: Case) -> Sample:
        prompt_BS = torch.tensor(case.prompts())
        with torch.inference_mode():
            return record(case, lambda: self._feed(prompt_BS, None), lambda state: self._feed(*state))

    def _feed(self, tokens_BS: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = self.model(tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values
