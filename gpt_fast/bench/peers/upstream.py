"""meta-pytorch/gpt-fast from a checkout, compiled as its generate.py does it; argmax instead of its sampler.

Weights: ours in bfloat16, or quantized by its own quantize.py where ours are int8. One row.
"""

from __future__ import annotations

import inspect
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_fast.bench.peers import PeerOptions
from gpt_fast.bench.recorder import record
from gpt_fast.bench.sample import Case, Description, Sample, Unavailable
from gpt_fast.load.checkpoint import Loaded, load_checkpoint

NAME = "gpt-fast"


def load(options: PeerOptions) -> Upstream:
    return Upstream(options)


class Upstream:
    def __init__(self, options: PeerOptions) -> None:
        checkout = options.need_path(NAME)
        if not (checkout / "generate.py").is_file():
            raise Unavailable(f"{NAME}: no generate.py in {checkout}: git clone github.com/meta-pytorch/gpt-fast")
        sys.path.insert(0, str(checkout))
        import generate

        torch.set_num_threads(options.threads)
        started = time.perf_counter()
        self.generate: Any = generate
        self.generate.sample = greedy
        self.model, mode = build(options.checkpoint)
        self.model.setup_caches(max_batch_size=1, max_seq_length=options.max_seq_len)
        self.takes_mask = "block_mask" in inspect.signature(generate.decode_one_token).parameters
        self.decode: Any = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
        read = (self.model.layers, self.model.output)
        weights = sum(tensor.nbytes for module in read for tensor in module.state_dict().values())
        facts = {"torch": torch.__version__, "format": mode, "compile": "reduce-overhead"}
        self.description = Description(weights, options.kv_bytes(2), time.perf_counter() - started, facts)

    def describe(self) -> Description:
        return self.description

    def run(self, case: Case) -> Sample:
        if case.rows > 1:
            raise Unavailable(f"{NAME}: decodes one row")
        prompt_S = torch.tensor(case.prompts()[0], dtype=torch.int)
        positions = iter(range(case.prompt_len, case.prompt_len + case.new_tokens))
        with torch.inference_mode():
            mask = self._mask()
            return record(
                case,
                lambda: self._prefill(prompt_S),
                lambda token: self.decode(self.model, token, torch.tensor([next(positions)]), *mask)[0].clone(),
            )

    def _prefill(self, prompt_S: Tensor) -> Tensor:
        token: Tensor = self.generate.prefill(self.model, prompt_S.view(1, -1), torch.arange(len(prompt_S)))
        return token.view(1, 1).clone()

    def _mask(self) -> tuple[Any, ...]:
        """Newer checkouts pass flex attention's block mask to each step."""
        if not self.takes_mask:
            return ()
        size = self.model.max_seq_length
        return (self.generate.create_block_mask(self.generate.causal_mask, 1, 1, size, size, device="cpu"),)


def greedy(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """In place of generate.sample: (token, a value nobody looks at)."""
    token = logits[:, -1].argmax(-1, keepdim=True).to(torch.int)
    return token, token


def build(checkpoint: Path) -> tuple[Any, str]:
    """Its Transformer with our weights, and the format's name."""
    import model as upstream_model

    own = load_checkpoint(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    mode = (own.quantization or {}).get("mode", "bfloat16")
    if mode not in ("bfloat16", "int8"):
        raise Unavailable(f"{NAME}: {mode} is not measured: its int4 kernels need CUDA")
    plain = (
        own
        if own.quantization is None
        else load_checkpoint(own.directory, device=torch.device("cpu"), dtype=torch.bfloat16)
    )
    model = upstream_model.Transformer(model_args(plain, upstream_model)).to(torch.bfloat16)
    model.load_state_dict(dict(plain.model.state_dict()))
    if mode == "int8":
        from quantize import WeightOnlyInt8QuantHandler

        handler = WeightOnlyInt8QuantHandler(model)
        weights = handler.create_quantized_state_dict()
        model = handler.convert_for_runtime()
        model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), mode


def model_args(loaded: Loaded, upstream_model: Any) -> Any:
    c = loaded.config
    return upstream_model.ModelArgs(
        block_size=c.max_position,
        vocab_size=c.vocab_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        dim=c.dim,
        intermediate_size=c.intermediate_size,
        n_local_heads=c.n_kv_head,
        rope_base=c.rope_base,
        norm_eps=c.norm_eps,
    )
