"""GpuDecoder: a Transformer's forward of few tokens on fused kernels, with gpt_fast.model.transformer.Transformer as
its twin.

Shapes: B rows, S tokens of a row, M = B * S tokens, D model dim, H query heads, E head_dim, I feed-forward dim,
V vocabulary, R tokens whose logits are wanted; caches [layers, slots, KV heads, positions, head_dim].

A layer is five operations: norm + QKV + RoPE + cache write; attention over what is cached; output projection and
residual; norm + gate/up + SiLU; down projection + residual. On a GPU a step is one CUDA graph per shape. Elsewhere the
same code runs the kernels' plain PyTorch twins, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_fast.model.forward import Batch, Forward
from gpt_fast.ops.gpu.attention import attention_workspace
from gpt_fast.ops.gpu.capture import Captured
from gpt_fast.ops.gpu.gemv import MAX_TOKENS
from gpt_fast.ops.gpu.layer_cache import LayerCache, head_workspace
from gpt_fast.ops.gpu.pack import GpuLinear, interleave, pack_fp8, pack_linear

if TYPE_CHECKING:
    from gpt_fast.model.cache import KVCache
    from gpt_fast.model.transformer import Transformer

MAX_TURNS = 4  # of MAX_TOKENS; each reads the weights again, and more than these take the path for many
SHORTEST = POSITIONS_PER_SPLIT = 64  # cached positions; fewer are not worth a program of their own
PROGRAMS_PER_PROCESSOR = 2
PROCESSORS = 132  # assumed where the device does not say: a CPU running the twins


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None. The CPU runs their twins."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no fused kernels for {device.type}"
    if torch.version.hip:
        return "ROCm: the fused GPU kernels are CUDA's"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)}: the fused GPU kernels need compute capability 8.0"
    return None if find_spec("triton") else "triton is not installed"


def unsupported(model: Transformer) -> str | None:
    """Why this model must use the plain path, or None."""
    c = model.config
    refused = {
        f"n_expert={c.n_expert}: the GPU decoder has no mixture of experts": c.n_expert,
        f"head_dim={c.head_dim}: the GPU decoder needs a multiple of 16 up to 128": c.head_dim % 16 or c.head_dim > 128,
        f"sliding_window={c.sliding_window}: the GPU decoder sees everything": c.sliding_window and c.sliding_layers,
        "qk_norm: the GPU decoder has none": c.qk_norm,
        "the GPU decoder has no biases": c.qkv_bias or c.attention_out_bias or c.mlp_bias,
    }
    return next((reason for reason, holds in refused.items() if holds), None)


class Ops(NamedTuple):
    """The kernels, or their twins."""

    norm_qkv_rope_write: Callable[..., None]
    attention: Callable[..., None]
    linear_residual: Callable[..., None]
    norm_gate_up_silu: Callable[..., None]
    norm_head: Callable[..., None]
    sample: Callable[..., None]


def ops_for(device: torch.device) -> Ops:
    from gpt_fast.ops.gpu import attention, gemv, sampler

    names = [
        (gemv, "norm_qkv_rope_write"),
        (attention, "decode_attention"),
        (gemv, "linear_residual"),
        (gemv, "norm_gate_up_silu"),
        (gemv, "norm_head"),
        (sampler, "sample"),
    ]
    suffix = "" if device.type == "cuda" else "_reference"
    return Ops(*(getattr(module, name + suffix) for module, name in names))


class Layer(NamedTuple):
    attention_norm: Tensor
    qkv: GpuLinear
    out: GpuLinear
    ffn_norm: Tensor
    gate_up: GpuLinear
    down: GpuLinear


class Inputs(NamedTuple):
    """A step's tokens, where each belongs, and how many positions of its slot it reads: int64 [M] each."""

    tokens_M: Tensor
    positions_M: Tensor
    slots_M: Tensor
    lengths_M: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Inputs:
        return cls(*(torch.zeros(count, dtype=torch.int64, device=device) for _ in cls._fields))

    def first(self, count: int) -> Inputs:
        return Inputs(*(tensor[:count] for tensor in self))


class Scratch(NamedTuple):
    """What the kernels pass to each other, for MAX_TOKENS tokens; a step uses the first M rows."""

    x_MD: Tensor
    y_MD: Tensor
    q_MHE: Tensor
    attended_MHE: Tensor
    hidden_MI: Tensor
    logits_MV: Tensor

    def first(self, count: int) -> Scratch:
        return Scratch(*(tensor[:count] for tensor in self))


class GpuDecoder:
    """`forward` of `model`'s weights, packed for the kernels; long rows, i.e. prompts, go to `prefill`.

    prefill: a Forward of the same model (compiled, perhaps); None: the model itself. fp8: round float matrices to e4m3.
    One forward at a time. Modules of gpt_fast.quantize keep their codes and must not be packed yet. Where it can, the
    model's own weights become views of the decoder's, so that none is held twice.
    Raises ValueError for a model that `unsupported`, a device that `unavailable` or a weight that no kernel reads.
    """

    def __init__(self, model: Transformer, *, prefill: Forward | None = None, fp8: bool = False) -> None:
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        if reason := unavailable(self.device) or unsupported(model):
            raise ValueError(reason)
        if model.rope_cos_sin_PE is None:
            raise ValueError("model: call setup_rope before building the GPU decoder")
        self.config, self.cos_sin = model.config, model.rope_cos_sin_PE
        self.ops = ops_for(self.device)
        self.embedding, self.norm = model.tok_embeddings, model.norm.weight.detach()
        self.layers = [pack_layer(layer, fp8) for layer in model.layers]
        self.head = pack(model.output, fp8)
        self.prefill: Forward = prefill or model
        self.inputs = Inputs.empty(MAX_TOKENS, self.device)
        self.select_B = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=self.device)
        on_cuda = self.device.type == "cuda"
        self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_cuda else PROCESSORS
        self.scratch = self.make_scratch()
        most = self.reach(1, 1, model.config.max_position)
        self.workspace = attention_workspace(
            MAX_TOKENS, model.config.n_head, model.config.head_dim, splits=most, device=self.device
        )
        self.heads = head_workspace(MAX_TOKENS, model.config.n_kv_head, model.config.head_dim, self.device)
        self.graphs: dict[tuple[Any, ...], Captured] = {}

    def forward(self, batch: Batch) -> Tensor:
        """As Transformer.forward; a padding token reads one position and its logits mean nothing."""
        B, S = batch.tokens_BS.shape
        if S > MAX_TOKENS or B * S > MAX_TURNS * MAX_TOKENS:
            return self.prefill(batch)
        if B * S > MAX_TOKENS:
            turns = [slice(first, first + MAX_TOKENS // S) for first in range(0, B, MAX_TOKENS // S)]
            return torch.cat([self.forward(batch.rows(part)) for part in turns])
        self.fill(batch)
        select_B = batch.select_B
        selects = select_B is not None and S > 1  # of one token a row there is nothing to select
        if select_B is not None:
            self.select_B[:B] = select_B
        self.graph(B, S, selects, self.reach(B, S, batch.length), batch.cache).replay()
        logits = self.scratch.logits_MV[: B if selects else B * S].clone()  # the next step writes there
        return logits if select_B is not None else logits.view(B, S, -1)

    __call__ = forward

    def fill(self, batch: Batch) -> None:
        """Put a step where its graph reads it."""
        (B, S), slots_B = batch.tokens_BS.shape, batch.slots_B
        into = self.inputs.first(B * S)
        if slots_B is None:
            slots_B = torch.arange(B, device=self.device)
        into.tokens_M.copy_(batch.tokens_BS.reshape(-1))
        into.positions_M.copy_(batch.positions_BS.reshape(-1))
        into.slots_M.view(B, S).copy_(slots_B[:, None])
        into.lengths_M.copy_(torch.where(into.positions_M == batch.cache.scratch, 1, into.positions_M + 1))

    def graph(self, rows: int, size: int, selects: bool, reach: int, cache: KVCache) -> Captured:
        """The step's graph. The first of a shape brings those of every length, so that a warm-up meets them all."""
        key = (cache, rows, size, selects)  # the cache itself: a graph holds nothing of what it points to
        if (*key, reach) not in self.graphs:
            inputs, select_B = self.inputs.first(rows * size), self.select_B[:rows] if selects else None
            for each in self.reaches(rows, size, cache.max_seq_len):
                step = partial(self.step, inputs, cache, reach=each, size=size, select_B=select_B)
                self.graphs[*key, each] = Captured(step, self.device)
        return self.graphs[*key, reach]

    # ---- the step itself: what graphs capture

    def step(
        self, inputs: Inputs, cache: KVCache, *, reach: int, size: int = 1, select_B: Tensor | None = None
    ) -> Tensor:
        """Run M tokens, `size` neighbours of each row: float32 logits [R, V], where the next step puts its own.

        reach: see there. select_B: of token select_B[b] of each row b; None: of all. More than MAX_TOKENS tokens take
        the path for many, and must be one of each slot from slot 0 on. No host synchronization.
        """
        eps, M = self.config.norm_eps, len(inputs.tokens_M)
        if M > MAX_TOKENS:
            length = min(reach, cache.max_seq_len)
            return self.prefill(Batch(inputs.tokens_M[:, None], inputs.positions_M[:, None], cache, length))[:, 0]
        s = self.scratch.first(M)
        self.embed(inputs.tokens_M, s.x_MD)
        for index, layer in enumerate(self.layers):
            held = LayerCache.of(cache, index)
            self.ops.norm_qkv_rope_write(
                s.x_MD,
                layer.attention_norm,
                layer.qkv,
                self.cos_sin,
                inputs.positions_M,
                inputs.slots_M,
                held,
                self.heads,
                s.q_MHE,
                eps=eps,
            )
            self.ops.attention(
                s.q_MHE,
                held,
                inputs.slots_M,
                inputs.lengths_M,
                self.workspace,
                s.attended_MHE,
                scale=self.config.head_dim**-0.5,
                splits=reach,
                rows_per_slot=size,
            )
            self.ops.linear_residual(s.attended_MHE.flatten(1), layer.out, s.x_MD, s.y_MD)
            self.ops.norm_gate_up_silu(s.y_MD, layer.ffn_norm, layer.gate_up, s.hidden_MI, eps=eps)
            self.ops.linear_residual(s.hidden_MI, layer.down, s.y_MD, s.x_MD)
        x_RD = s.x_MD
        if select_B is not None:
            x_RD = s.x_MD.view(-1, size, s.x_MD.shape[1])[torch.arange(M // size, device=self.device), select_B]
        logits_RV = s.logits_MV[: len(x_RD)]
        self.ops.norm_head(x_RD, self.norm, self.head, logits_RV, eps=eps)
        return logits_RV

    def embed(self, tokens_M: Tensor, out_MD: Tensor) -> None:
        if isinstance(self.embedding, nn.Embedding):
            torch.index_select(self.embedding.weight.detach(), 0, tokens_M, out=out_MD)
        else:
            out_MD.copy_(self.embedding(tokens_M))

    def reach(self, rows: int, size: int, length: int) -> int:
        """What the graph of a shape fixes of the `length` positions it may read; actual lengths are on the device.

        The pieces attention cuts them into, so that the whole GPU is busy; on the path for many tokens, their bucket.
        """
        if rows * size > MAX_TOKENS:
            return max(1 << (length - 1).bit_length(), SHORTEST)
        return splits_for(length, programs=rows * self.config.n_kv_head, processors=self.processors)

    def reaches(self, rows: int, size: int, longest: int) -> list[int]:
        """Every value of `reach` for lengths up to `longest`."""
        lengths = [SHORTEST << i for i in range(longest.bit_length()) if SHORTEST << i < longest]
        return sorted({self.reach(rows, size, length) for length in (1, *lengths, longest)})

    def make_scratch(self) -> Scratch:
        c, M = self.config, MAX_TOKENS

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(M, *shape, dtype=dtype, device=self.device)

        heads = (c.n_head, c.head_dim)
        return Scratch(
            empty(c.dim),
            empty(c.dim),
            empty(*heads),
            empty(*heads),
            empty(c.intermediate_size),
            empty(c.vocab_size, dtype=torch.float32),
        )


def splits_for(length: int, *, programs: int, processors: int) -> int:
    """A power of two: enough pieces for PROGRAMS_PER_PROCESSOR, none shorter than POSITIONS_PER_SPLIT."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // programs)
    possible = max(length // POSITIONS_PER_SPLIT, 1)
    return 1 << (min(wanted, possible).bit_length() - 1)


# --------------------------------------------------------------------------------------------- weights


def pack(module: Any, fp8: bool = False) -> GpuLinear:
    """A linear's weight for the kernels. ValueError for what none reads."""
    module = getattr(module, "embedding", module)  # a tied head's
    if not hasattr(module, "quantized_weight"):
        weight = module.weight.detach()
        return pack_fp8(weight) if fp8 else pack_linear(weight)
    weight, scale, minimum = module.quantized_weight()
    return pack_linear(weight, scale, minimum, groupsize=module.scheme.groupsize)


def pack_layer(layer: Any, fp8: bool = False) -> Layer:
    attention, feed_forward = layer.attention, layer.feed_forward
    gate_up = interleave(pack(feed_forward.w1, fp8), pack(feed_forward.w3, fp8))
    for index, module in enumerate((feed_forward.w1, feed_forward.w3)):
        view = gate_up.weight[index::2]
        if gate_up.kind == "bf16":
            module.weight = nn.Parameter(view, requires_grad=False)
        elif gate_up.kind == "int8" and view.is_cuda:  # the CPU's int8 product wants its rows together
            module.weight = view
    return Layer(
        layer.attention_norm.weight.detach(),
        pack(attention.wqkv, fp8),
        pack(attention.wo, fp8),
        layer.ffn_norm.weight.detach(),
        gate_up,
        pack(feed_forward.w2, fp8),
    )


def weight_bytes(decoder: GpuDecoder) -> int:
    """What a step reads of weights: all matrices and norms, no row of the embedding."""
    matrices = [decoder.head, *(part for layer in decoder.layers for part in layer if isinstance(part, GpuLinear))]
    norms = [decoder.norm, *(part for layer in decoder.layers for part in layer if isinstance(part, Tensor))]
    return sum(t.nbytes for t in norms) + sum(t.nbytes for m in matrices for t in m[1:4] if isinstance(t, Tensor))
