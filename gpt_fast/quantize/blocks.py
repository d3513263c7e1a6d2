"""GPTQ over a whole model, one Transformer block at a time.

Shapes: C calibration windows, S tokens of a window, B windows of one forward, D model dim.

Held at any time: one block in float32, its Hessians, and one tensor of hidden states, which each block overwrites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt_fast.attention import causal_mask
from gpt_fast.cache import KVCache
from gpt_fast.config import ModelConfig
from gpt_fast.model import Block, RMSNorm, StepInput, attention_window, rope_table
from gpt_fast.quantize.gptq import Hessian, gptq_int4
from gpt_fast.quantize.rtn import dequantize_weight, quantize_weight
from gpt_fast.quantize.scheme import Scheme

# Linear layers in the order that a block runs them; those of one stage see the same quantized predecessors.
STAGES = (("wqkv",), ("wo",), ("w1", "w3"), ("w2",))
TOKENS_PER_FORWARD = 2048

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True)
class GPTQOptions:
    """See gptq_int4."""

    percdamp: float = 0.01
    blocksize: int = 128
    act_order: bool = True


def gptq_model(
    config: ModelConfig,
    read: ReadTensor,
    schemes: Mapping[str, Scheme],
    tokens_CS: Tensor,
    *,
    options: GPTQOptions,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(module name, its stored tensors) for every int4 module of `schemes`, in the order the model runs them.

    `read` gives the source's tensors by name; tokens_CS is int64, on the device to work on.
    """
    embedding = read("tok_embeddings.weight")
    hidden_CSD = embedding[tokens_CS.to(embedding.device)].to(tokens_CS.device).float()
    del embedding
    for index in range(config.n_layer):
        runner = BlockRunner(config, index, read, hidden_CSD)
        for stage in STAGES:
            linears = {
                f"layers.{index}.{name}": module
                for name, module in runner.block.named_modules()
                if name.rpartition(".")[2] in stage and f"layers.{index}.{name}" in schemes
            }
            for name, hessian in runner.hessians(linears).items():
                yield name, quantize_linear(linears[name], hessian, schemes[name], options, name=name)
        runner.advance()
    if "output" in schemes:
        yield "output", gptq_head(config, read, hidden_CSD, schemes["output"], options)


class BlockRunner:
    """One block in float32 and the hidden states that reach it; whole windows from position 0."""

    def __init__(self, config: ModelConfig, index: int, read: ReadTensor, hidden_CSD: Tensor) -> None:
        length, device = hidden_CSD.shape[1], hidden_CSD.device
        self.hidden_CSD = hidden_CSD
        self.rows = max(1, TOKENS_PER_FORWARD // length)
        self.window = attention_window(config, index)
        self.group = config.n_head // config.n_kv_head
        self.rope_PE = rope_table(config, length).to(device)
        self.block = load_block(config, index, read, device)
        one_layer = dataclasses.replace(config, n_layer=1)
        self.cache = KVCache(one_layer, slots=self.rows, max_seq_len=length, dtype=torch.float32, device=device)

    def hessians(self, linears: Mapping[str, nn.Linear]) -> dict[str, Hessian]:
        """The Hessian of each linear's inputs over all windows. The block runs only as far as the last of them."""
        gathered = {name: Hessian(linear.in_features, self.hidden_CSD.device) for name, linear in linears.items()}
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, hessian=gathered[name]: hessian.add(args[0]))
            for name, linear in linears.items()
        ]
        hooks += [linear.register_forward_hook(stop_forward) for linear in list(linears.values())[-1:]]
        for start in range(0, len(self.hidden_CSD), self.rows):
            with suppress(EndOfStage):  # a mixture may not reach its last expert, and runs to the end
                self.forward(self.hidden_CSD[start : start + self.rows])
        for hook in hooks:
            hook.remove()
        return gathered

    def advance(self) -> None:
        """Replace the hidden states by the block's output."""
        for start in range(0, len(self.hidden_CSD), self.rows):
            rows = slice(start, start + self.rows)
            self.hidden_CSD[rows] = self.forward(self.hidden_CSD[rows])

    @torch.no_grad()
    def forward(self, hidden_BSD: Tensor) -> Tensor:
        rows, length, _ = hidden_BSD.shape
        positions_BS = torch.arange(length, device=hidden_BSD.device).repeat(rows, 1)
        mask = causal_mask(positions_BS, length, group=self.group, window=self.window)
        step = StepInput(positions_BS, None, length, self.rope_PE[positions_BS], {self.window: mask})
        return self.block(hidden_BSD, step, self.cache)


class EndOfStage(Exception):
    """Ends a block's forward once a stage's inputs are known."""


def stop_forward(*_: object) -> None:
    raise EndOfStage


def load_block(config: ModelConfig, index: int, read: ReadTensor, device: torch.device) -> Block:
    """Block `index` in float32, which keeps its keys and values in the first layer of whatever cache it is given."""
    with torch.device("meta"):
        block = Block(config, index)
    state = {name: read(f"layers.{index}.{name}").to(device).float() for name in block.state_dict()}
    block.load_state_dict(state, assign=True)
    block.attention.index = 0
    return block


@torch.no_grad()
def quantize_linear(
    linear: nn.Linear, hessian: Hessian, scheme: Scheme, options: GPTQOptions, *, name: str
) -> dict[str, Tensor]:
    """Quantize the linear's weight, and leave the quantized values in it for what runs after it.

    An expert that no calibration token reached is rounded to nearest.
    """
    if hessian.tokens == 0:
        tensors = quantize_weight(linear.weight, scheme, name=name)
    else:
        tensors = gptq_int4(
            linear.weight,
            hessian.sum_KK,
            groupsize=scheme.groupsize,
            percdamp=options.percdamp,
            blocksize=options.blocksize,
            act_order=options.act_order,
            name=name,
        )
    linear.weight.copy_(dequantize_weight(tensors, scheme))
    return tensors


@torch.no_grad()
def gptq_head(
    config: ModelConfig, read: ReadTensor, hidden_CSD: Tensor, scheme: Scheme, options: GPTQOptions
) -> dict[str, Tensor]:
    norm = RMSNorm(config.dim, config.norm_eps).to(hidden_CSD.device)
    norm.weight.copy_(read("norm.weight"))
    hessian = Hessian(config.dim, hidden_CSD.device)
    for hidden_SD in hidden_CSD:
        hessian.add(norm(hidden_SD))
    head = nn.Linear(config.dim, config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(read("output.weight").to(hidden_CSD.device).float(), requires_grad=False)
    return quantize_linear(head, hessian, scheme, options, name="output")
