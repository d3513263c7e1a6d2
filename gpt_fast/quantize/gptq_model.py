"""GPTQ over a whole model, one Transformer block at a time.

Shapes: C calibration windows, S tokens of a window, B windows of one forward, D model dim, K inputs of a linear.

Held at any time: what the block's linears were quantized to, half a Hessian for each that is quantized next, and the
activations of one forward. The source's weights are read where they are used, the hidden states kept in a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt_fast.config import ModelConfig
from gpt_fast.model.attention import causal_mask
from gpt_fast.model.cache import KVCache
from gpt_fast.model.empty import without_memory
from gpt_fast.model.rope import rope_table
from gpt_fast.model.transformer import Block, LayerInput, RMSNorm, attention_window
from gpt_fast.quantize.gptq import Factor, Hessian, InputSizes, damped_factor, gptq_int4
from gpt_fast.quantize.gptq_streaming import HiddenStates, ReadTensor, StreamedLinear
from gpt_fast.quantize.rtn import quantize_in_bands
from gpt_fast.quantize.scheme import Scheme

# Linear layers in the order that a block runs them; those of one stage see the same quantized predecessors, and where
# they have the same parent the same inputs.
STAGES = (("wqkv",), ("wo",), ("w1", "w3"), ("w2",))
TOKENS_PER_FORWARD = 1024

Parts = dict[str, Tensor]
See = Callable[[Tensor], None]  # is given the inputs of a linear, batch by batch
RunPast = Callable[[Mapping[str, See]], None]  # the calibration text through linears, by name


@dataclass(frozen=True)
class GPTQOptions:
    """See damped_factor and gptq_int4. act_order: the columns with the largest inputs first."""

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
    scratch: Path | None = None,
) -> Iterator[tuple[str, Parts]]:
    """(module name, its stored tensors) for every int4 module of `schemes`, in the order the model runs them.

    `read` gives the source's tensors by name; tokens_CS is int64, on the device to work on; the hidden states (C * S *
    D * 4 bytes) are kept in the directory `scratch`, or where temporary files are.
    """
    hidden = embed(read("tok_embeddings.weight"), tokens_CS, scratch)
    for index in range(config.n_layer):
        runner = BlockRunner(config, index, read, hidden, tokens_CS.device)
        for stage in STAGES:
            linears = {
                name: module
                for name, module in runner.linears().items()
                if name.rpartition(".")[2] in stage and name in schemes
            }
            if linears:
                yield from quantize_stage(linears, schemes, options, runner.run_past)
        runner.advance()
    if "output" in schemes:
        yield from quantize_head(config, read, hidden, tokens_CS.device, schemes, options)


def embed(embedding_VD: Tensor, tokens_CS: Tensor, scratch: Path | None) -> HiddenStates:
    hidden = HiddenStates(len(tokens_CS), tokens_CS.shape[1], embedding_VD.shape[1], directory=scratch)
    for row, tokens_S in enumerate(tokens_CS.to(embedding_VD.device)):
        hidden.write(row, embedding_VD[tokens_S])
    return hidden


class BlockRunner:
    """One block in float32 and the hidden states that reach it; whole windows from position 0."""

    def __init__(
        self, config: ModelConfig, index: int, read: ReadTensor, hidden: HiddenStates, device: torch.device
    ) -> None:
        self.hidden, self.device = hidden, device
        self.rows = max(1, TOKENS_PER_FORWARD // hidden.length)
        self.window = attention_window(config, index)
        self.group = config.n_head // config.n_kv_head
        self.rope_PE = rope_table(config, hidden.length).to(device)
        self.prefix = f"layers.{index}"
        self.block = load_block(config, index, read, device)
        one_layer = dataclasses.replace(config, n_layer=1)
        self.cache = KVCache(one_layer, slots=self.rows, max_seq_len=hidden.length, dtype=torch.float32, device=device)

    def linears(self) -> dict[str, StreamedLinear]:
        """By the model's name, in the block's order."""
        modules = self.block.named_modules(prefix=self.prefix)
        return {name: module for name, module in modules if isinstance(module, StreamedLinear)}

    def run_past(self, see: Mapping[str, See]) -> None:
        """Show each of these linears' inputs over all windows. The block runs only as far as the last of them."""
        linears = [(linear, see[name]) for name, linear in self.linears().items() if name in see]
        hooks = [linear.register_forward_pre_hook(lambda _, args, look=look: look(args[0])) for linear, look in linears]
        hooks += [linear.register_forward_pre_hook(stop_forward) for linear, _ in linears[-1:]]
        for start in range(0, self.hidden.windows, self.rows):
            with suppress(EndOfStage):  # a mixture may not reach its last expert, and runs to the end
                self.forward(start)
        for hook in hooks:
            hook.remove()

    def advance(self) -> None:
        """Replace the hidden states by the block's output."""
        for start in range(0, self.hidden.windows, self.rows):
            self.hidden.write(start, self.forward(start))

    @torch.no_grad()
    def forward(self, start: int) -> Tensor:
        """The block's output for the windows from `start` on, as many as run together: [B, S, D]."""
        hidden_BSD = self.hidden.read(start, self.rows).to(self.device)
        rows, length, _ = hidden_BSD.shape
        positions_BS = torch.arange(length, device=self.device).repeat(rows, 1)
        mask = causal_mask(positions_BS, length, group=self.group, window=self.window)
        step = LayerInput(positions_BS, None, length, self.rope_PE[positions_BS], {self.window: mask})
        out_BSD: Tensor = self.block(hidden_BSD, step, self.cache)
        return out_BSD


class EndOfStage(Exception):
    """Ends a block's forward once a stage's inputs are known."""


def stop_forward(*_: object) -> None:
    raise EndOfStage


def load_block(config: ModelConfig, index: int, read: ReadTensor, device: torch.device) -> Block:
    """Block `index` in float32, which keeps its keys and values in the first layer of whatever cache it is given."""
    with without_memory():
        block = Block(config, index)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        block.set_submodule(name, StreamedLinear(linear, read, f"layers.{index}.{name}", device))
    state = {name: read(f"layers.{index}.{name}").to(device).float() for name in block.state_dict()}
    block.load_state_dict(state, assign=True)
    block.attention.index = 0
    return block


def quantize_stage(
    linears: Mapping[str, StreamedLinear], schemes: Mapping[str, Scheme], options: GPTQOptions, run_past: RunPast
) -> Iterator[tuple[str, Parts]]:
    """Quantize the linears on their inputs, and leave the result in them for what runs after them.

    Those of one parent share a Hessian. An expert that no calibration token reached is rounded to nearest.
    """
    families: dict[str, list[str]] = {}
    for name in linears:
        families.setdefault(name.rpartition(".")[0], []).append(name)
    hessians = gather_hessians({names[0]: linears[names[0]] for names in families.values()}, run_past, options)
    for names in families.values():
        factor = factor_of(hessians.pop(names[0]), options, name=names[0])
        for name in names:
            parts = quantize_linear(linears[name], factor, schemes[name], options, name=name)
            linears[name].quantized = (parts, schemes[name])
            yield name, parts


def factor_of(hessian: Hessian, options: GPTQOptions, *, name: str) -> Factor | None:
    return damped_factor(hessian, percdamp=options.percdamp, name=name) if hessian.tokens else None


def quantize_linear(
    linear: StreamedLinear, factor: Factor | None, scheme: Scheme, options: GPTQOptions, *, name: str
) -> Parts:
    if factor is None:
        return quantize_in_bands(linear.source(), scheme, device=linear.device, name=name)
    return gptq_int4(
        linear.source(),
        factor,
        groupsize=scheme.groupsize,
        blocksize=options.blocksize,
        device=linear.device,
        name=name,
    )


def gather_hessians(
    linears: Mapping[str, StreamedLinear], run_past: RunPast, options: GPTQOptions
) -> dict[str, Hessian]:
    """Of each linear's inputs. The columns' order is found in a pass of its own: half a matrix is not reordered."""
    orders: dict[str, Tensor | None] = dict.fromkeys(linears)
    if options.act_order:
        sizes = {name: InputSizes(linear.in_features, linear.device) for name, linear in linears.items()}
        run_past({name: size.add for name, size in sizes.items()})
        orders = {name: size.order() for name, size in sizes.items()}
    hessians = {name: Hessian(linear.in_features, linear.device, orders[name]) for name, linear in linears.items()}
    run_past({name: hessian.add for name, hessian in hessians.items()})
    return hessians


def quantize_head(
    config: ModelConfig,
    read: ReadTensor,
    hidden: HiddenStates,
    device: torch.device,
    schemes: Mapping[str, Scheme],
    options: GPTQOptions,
) -> Iterator[tuple[str, Parts]]:
    norm = RMSNorm(config.dim, config.norm_eps).to(device).requires_grad_(False)
    norm.weight.copy_(read("norm.weight"))
    with without_memory():
        shape = nn.Linear(config.dim, config.vocab_size, bias=False)
    head = StreamedLinear(shape, read, "output", device)

    def run_past(see: Mapping[str, See]) -> None:
        for row in range(hidden.windows):
            see["output"](norm(hidden.read(row, 1).to(device)))

    yield from quantize_stage({"output": head}, schemes, options, run_past)
