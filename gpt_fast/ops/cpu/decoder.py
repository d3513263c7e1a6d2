"""CpuDecoder: a Transformer's forward as one C++ call (src/decoder.h), with gpt_fast.model.transformer.Transformer as
its twin.

Shapes: B rows, S tokens of a row, V vocabulary, N outputs, K inputs; caches [layers, slots, KV heads, positions, dim].

Every output is the same sequence of float operations whatever the batch, the number of tokens of a call and the
number of threads: a row's logits are the same bits alone, in any batch, in decode, verification and prefill.

The decoder of one rank's share of a model (gpt_fast.model.parallel) has a Link to the other ranks of this machine.
Every rank must then begin the same steps in the same order; each gets all logits and best tokens, the same bytes.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import Structure, byref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt_fast.model.forward import Batch
from gpt_fast.model.parallel import is_sharded
from gpt_fast.ops.cpu import build, pack
from gpt_fast.ops.cpu.link import Link, RanksLost
from gpt_fast.ops.cpu.pack import Arena, Packed
from gpt_fast.ops.cpu.screen import build_screen, code_bytes, is_worth_it
from gpt_fast.ops.cpu.structs import (
    LINK_ENDED,
    STEP_ERRORS,
    LayerWeights,
    Linear,
    ModelWeights,
    StepInput,
    load_library,
)
from gpt_fast.ops.cpu.tuning import Choice, Tuned, tune
from gpt_fast.ops.cpu.weights import Packer

if TYPE_CHECKING:
    from gpt_fast.model.transformer import Transformer

WEIGHTS = ("bfloat16", "int8", "int8_groups", "int4")
EMBEDDING_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
SPIN_MICROSECONDS = 50  # a waiting thread spins, before it sleeps and the core is another's


def unsupported(model: Transformer) -> str | None:
    """Why this machine or model must use the plain path, or None."""
    config = model.config
    if reason := build.unavailable():
        return reason
    if config.n_expert:
        return f"n_expert={config.n_expert}: the CPU decoder has no mixture of experts"
    if config.head_dim % pack.TILE:
        return f"head_dim={config.head_dim}: the CPU decoder needs a multiple of {pack.TILE}"
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "the model is not on the CPU"
    groups = {
        scheme.groupsize for scheme in (getattr(m, "scheme", None) for m in model.modules()) if scheme is not None
    }
    if odd := [group for group in groups if group % pack.GROUP]:
        return f"groups of {odd[0]} inputs: the CPU decoder needs multiples of {pack.GROUP}"
    return None


class Pool:
    """Threads that decoders share (a target and its draft); closed with its last user. `step` is what runs on it.

    apart: the caller's thread is not one of them: steps end without anyone asking for their results.
    """

    def __init__(
        self, library: ctypes.CDLL, threads: int, *, spin_microseconds: int = SPIN_MICROSECONDS, apart: bool = False
    ) -> None:
        self.library, self.threads = library, threads
        self.step: PendingCpuStep | None = None
        self.handle = library.gf_pool_create(threads, spin_microseconds, apart)

    def settle(self) -> None:
        """Wait for the step that runs, if any: there is room for one."""
        if self.step is not None:
            self.step.result()

    def __del__(self) -> None:
        with suppress(RanksLost):
            self.settle()
        self.library.gf_pool_destroy(self.handle)


class PendingCpuStep:
    """A forward under way on the pool's other threads. One waits for its turn behind the step whose tokens it takes."""

    def __init__(
        self, decoder: CpuDecoder, description: StepInput, logits: Tensor, best: Tensor, after: PendingCpuStep | None
    ) -> None:
        self.decoder, self.description = decoder, description  # which holds all that is read and written
        self.after = after  # held while it runs
        self.logits, self._best = logits, best
        if after is not None and after.after is not None:
            after.after.result()  # one step runs and one waits: there is no room for a third
        if after is None:
            decoder.pool.settle()
            error = decoder.library.gf_decoder_start(decoder.handle, byref(description))
        elif after.latest:
            description.tokens = None
            error = decoder.library.gf_decoder_follow(decoder.handle, byref(description))
        else:
            raise ValueError("after: is not the step that runs")
        decoder.check(error)
        decoder.steps += 1
        self.number, self.ended = decoder.steps, False
        decoder.pool.step = self

    @property
    def latest(self) -> bool:
        """Whether it may still run and no other step has begun since."""
        return self.decoder.pool.step is self

    def result(self) -> Tensor:
        """The logits, after helping to finish."""
        if not self.ended:
            error = self.decoder.library.gf_decoder_finish(self.decoder.handle, self.number)
            self.ended, self.after = True, None
            if self.decoder.pool.step is self:
                self.decoder.pool.step = None
            self.decoder.check(error)
        return self.logits

    def best(self) -> Tensor:
        """Where the largest logit of each row is, the lowest of equals; -1 where none is finite. int64."""
        self.result()
        return self._best


class CpuDecoder:
    """`forward` of a packed copy of `model`'s weights.

    weights: how float matrices are stored: "bfloat16"; "int8" (a scale a row); "int8_groups" (a scale per 32 inputs,
    GGUF's Q8_0); "int4" (scale and minimum per `group` inputs, with 32 GGUF's Q4_1; the head in int8_groups). Modules
    of gpt_fast.quantize, not yet packed, keep their own codes. Activations are int8 per 32 inputs beside integer
    weights, else bfloat16; sums, residual and attention are float32.
    threads: of the forward, the caller's included. pool: another decoder's, to share its threads. isa: one of
    build.ISAS, for tests. choice: of tuning.py, in place of what is best on this machine. link: to the other ranks, for
    a rank's share of a model. The caller's thread is then none of `threads`: the other ranks wait for a step, whether
    or not anyone here asks for its results. One forward at a time. The model's own weights are not needed afterwards,
    but for the embedding table, which is kept.
    Raises build.BuildError where it cannot be built, ValueError for a model that `unsupported` refuses; a step raises
    link.RanksLost once another rank has not kept up.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        weights: str,
        threads: int,
        group: int = 32,
        pool: Pool | None = None,
        isa: str | None = None,
        choice: Choice | None = None,
        link: Link | None = None,
    ) -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"weights: unknown format (got {weights!r}, allowed {', '.join(WEIGHTS)})")
        if reason := unsupported(model):
            raise ValueError(reason)
        if is_sharded(model) != (link is not None):
            raise ValueError("link: is for a rank's share of a model, which needs one")
        self.config, self.link = model.config, link
        self.library = load_library(isa)
        self.pool = pool or Pool(self.library, threads, apart=link is not None)
        self.kept: list[Tensor | Structure | ctypes.Array[Any]] = []  # what the C++ side points to
        self.arena = Arena()
        self.weight_bytes = 0  # what a step of one token reads
        self.greedy_saves = 0  # of that, what a greedy step of few rows leaves out, but for rows its screen does not
        self.steps = 0  # begun
        self.formats: set[int] = set()
        self.described = self.describe_model(model, Packer(weights, group))
        self.handle = self.library.gf_decoder_create(
            byref(self.described), self.pool.handle, None if link is None else link.handle
        )
        self.pool.settle()
        if link is None or link.rank == 0:
            self.set_tuning(choice)
        worth_it = is_worth_it(self.described.head, self.weight_bytes)
        if worth_it or link is not None:  # all ranks, for one alone cannot run a forward
            energy_D = self.head_energy()
        if link is not None and link.rank > 0:  # finds what rank 0 has measured and kept
            self.set_tuning(choice)
        if worth_it:
            self.screen_head(self.described.head, energy_D)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            with suppress(RanksLost):
                self.pool.settle()
            self.library.gf_decoder_destroy(self.handle)

    def start(self, batch: Batch, *, after: PendingCpuStep | None = None, best_only: bool = False) -> PendingCpuStep:
        """Begin a forward, as Transformer.forward, on the pool's other threads; `result` brings its logits.

        A padding token costs nothing, writes nothing and gets logits of zero.
        after: the step begun last, of one token a row, whose best tokens are fed instead of the batch's.
        best_only: nobody looks at the logits, which are empty ([..., 0]); the best tokens are the same, and for a few
        rows come sooner (src/screen.h).
        """
        B, S = batch.tokens_BS.shape
        shape = (B, S) if batch.select_B is None else (B,)
        logits = torch.empty((*shape, 0 if best_only else self.config.vocab_size), dtype=torch.float32)
        best = torch.empty(shape, dtype=torch.int64)
        return PendingCpuStep(self, StepInput.of(batch, logits, best), logits, best, after)

    def forward(self, batch: Batch) -> Tensor:
        """The logits at once."""
        return self.start(batch).result()

    __call__ = forward

    def check(self, error: int) -> None:
        """Raise what the C++ side returned, if it is an error."""
        if error == LINK_ENDED and self.link is not None:
            self.link.check()
        if error:
            raise ValueError(STEP_ERRORS[error])

    def set_tuning(self, choice: Choice | None) -> None:
        """As given, or as is best on this machine."""
        if choice is None:
            self.tuned = tune(self.library, self.pool.handle, self.pool.threads, self.described)
        else:
            self.tuned = Tuned(choice, "given")
        self.library.gf_decoder_set_tuning(self.handle, byref(self.tuned.choice.struct()))

    def screen_head(self, head: Linear, energy_D: Tensor) -> None:
        """Build the head's screen; the inputs that are largest in a forward of any tokens are its outliers."""
        built, kept = build_screen(self.library, head, energy_D, arena=self.arena, threads=self.pool.threads)
        self.kept += kept
        self.greedy_saves = code_bytes(head) - sum(t.nbytes for t in kept)
        self.library.gf_decoder_set_screen(self.handle, byref(built))

    def head_energy(self) -> Tensor:
        """The squares of the head's inputs [D], summed over a forward of tokens from all over the vocabulary."""
        c, tokens = self.config, min(16, self.positions)
        k, v = torch.zeros(2, c.n_layer, 1, c.n_kv_head, tokens + 1, c.head_dim)
        cache: Any = SimpleNamespace(k_LNHTD=k, v_LNHTD=v, slots=1, max_seq_len=tokens)
        energy_D = torch.empty(c.dim)
        tokens_1S = torch.linspace(0, c.vocab_size - 1, tokens).long()[None]
        self.forward(Batch(tokens_1S, torch.arange(tokens)[None], cache, length=tokens))
        self.library.gf_decoder_head_energy(self.handle, energy_D.data_ptr())
        return energy_D

    # ---- describing the model to C++

    def describe_model(self, model: Transformer, packer: Packer) -> ModelWeights:
        c = model.config
        if model.rope_cos_sin_PE is None:
            raise ValueError("model: call setup_rope before building the CPU decoder")
        self.positions = len(model.rope_cos_sin_PE)
        layers = (LayerWeights * c.n_layer)()
        for i, layer in enumerate(model.layers):
            self.describe_layer(layers[i], layer, packer)
        self.kept.append(layers)
        embedding: Any = model.tok_embeddings
        table, table_scale, table_group = embedding_table(embedding.embedding if self.link else embedding)
        return ModelWeights(
            n_layer=c.n_layer,
            dim=c.dim,
            n_head=c.n_head,
            n_kv_head=c.n_kv_head,
            head_dim=c.head_dim,
            ffn_dim=c.intermediate_size,
            vocab=c.vocab_size,
            rotary_dim=c.rotary_dim,
            vocab_first=embedding.first if self.link else 0,
            norm_eps=c.norm_eps,
            embedding_type=EMBEDDING_TYPES[table.dtype],
            embedding_group=table_group,
            embedding=self.keep(table),
            embedding_scale=None if table_scale is None else self.keep_float(table_scale),
            rope=self.keep_float(model.rope_cos_sin_PE),
            norm=self.keep_float(model.norm.weight),
            head=self.describe(packer.head(model.output)),
            layers=layers,
        )

    def describe_layer(self, out: LayerWeights, layer: Any, packer: Packer) -> None:
        attention = layer.attention
        out.qkv = self.describe(packer.body(attention.wqkv))
        out.out = self.describe(packer.body(attention.wo))
        out.gate_up = self.describe(packer.gate_up(layer.feed_forward))
        out.down = self.describe(packer.body(layer.feed_forward.w2))
        out.attention_norm = self.keep_float(layer.attention_norm.weight)
        out.ffn_norm = self.keep_float(layer.ffn_norm.weight)
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name)
            setattr(out, name, None if isinstance(norm, nn.Identity) else self.keep_float(norm.weight))
        out.window = attention.window or 0

    def describe(self, packed: Packed) -> Linear:
        self.formats.add(packed.format)
        if pack.BF16 in self.formats and len(self.formats) > 1:
            raise ValueError(
                "weights: bfloat16 cannot be mixed with quantized modules (allowed int8, int8_groups, int4)"
            )
        packed = packed.stored(self.arena)
        self.weight_bytes += packed.nbytes
        return Linear(
            format=packed.format,
            rows=packed.rows,
            cols=packed.cols,
            group=packed.group,
            q=self.keep(packed.q),
            scale=None if packed.scale is None else self.keep(packed.scale),
            bias=None if packed.bias is None else self.keep_float(packed.bias),
        )

    def keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def keep_float(self, tensor: Tensor) -> int:
        return self.keep(tensor.detach().float().contiguous())


def embedding_table(embedding: Any) -> tuple[Tensor, Tensor | None, int]:
    """(table [V, D], its scales or None, how many neighbours share a scale)."""
    if not hasattr(embedding, "quantized_weight"):
        return embedding.weight.detach(), None, 1
    table, scale, _ = embedding.quantized_weight()
    return table, scale, embedding.scheme.groupsize or table.shape[1]
