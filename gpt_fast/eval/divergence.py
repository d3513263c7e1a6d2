"""How far model A (quantized) is from model B (its source), token by token on the same text.

Shapes: C tokens of a chunk, V vocabulary, S tokens of a window, D model dim.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_fast.eval.score import Scorer, token_logprobs
from gpt_fast.model.parallel import all_reduce, is_sharded
from gpt_fast.model.transformer import MoE, Transformer
from gpt_fast.quantize.linear import Quantized
from gpt_fast.quantize.rtn import sqnr_db

PROMPT_TOKENS = 32
DIVERGENCE_TOKENS = 64
DIVERGENCE_PROMPTS = 8


class TokenFigures(NamedTuple):
    """Per predicted token: both models' negative log-likelihoods, KL(B || A) in nats, and whether top 1 agrees."""

    nll_a: Tensor
    nll_b: Tensor
    kl: Tensor
    same_top: Tensor


class Side(NamedTuple):
    """One of the two models: its scorer on the path it is served by and on the plain one, where the modules, i.e.
    every layer, can be watched."""

    model: Transformer
    scorer: Scorer
    plain: Scorer


def compare(
    a: Side, b: Side, windows: list[list[int]], weight_sqnrs_db: list[float]
) -> tuple[dict[str, Any], TokenFigures]:
    """The report's figures over `windows` of tokens, and the figures of every token. weight_sqnrs_db: each layer's."""
    parts = [figures for window in windows for figures in window_figures(a.scorer, b.scorer, window)]
    figures = TokenFigures(*(torch.cat(column) for column in zip(*parts, strict=True)))
    perplexity_a, perplexity_b = (math.exp(float(nll.double().mean())) for nll in (figures.nll_a, figures.nll_b))
    divergence = greedy_divergence(a.scorer, b.scorer, windows)
    report = {
        "tokens": len(figures.kl),
        "perplexity": perplexity_a,
        "perplexity_against": perplexity_b,
        "perplexity_ratio": perplexity_a / perplexity_b,
        "perplexity_ratio_error": ratio_error(figures),
        "mean_kl": float(figures.kl.double().mean()),
        "p99_kl": float(figures.kl.quantile(0.99)),
        "top1_agreement": float(figures.same_top.double().mean()),
        "greedy_divergence": divergence,
        "greedy_divergence_median": statistics.median(divergence),
        "greedy_tokens": DIVERGENCE_TOKENS,
        "layers": layer_figures(a, b, windows[0], weight_sqnrs_db),
    }
    return report, figures


def ratio_error(figures: TokenFigures) -> float:
    """The standard error of the perplexity ratio: that of the mean difference of the tokens' log-likelihoods."""
    difference = figures.nll_a.double() - figures.nll_b.double()
    return float(difference.mean().exp() * difference.std() / math.sqrt(len(difference)))


def window_figures(a: Scorer, b: Scorer, window: list[int]) -> Iterator[TokenFigures]:
    """Both models' figures for one window, a chunk at a time."""
    inputs = [window[:-1]]
    for (start, logits_a), (_, logits_b) in zip(a.logits(inputs), b.logits(inputs), strict=True):
        a_CV, b_CV = logits_a[0], logits_b[0].to(logits_a.device)
        target_C = torch.tensor(window[start + 1 : start + 1 + len(a_CV)], device=a_CV.device)
        kl_C = (b_CV.softmax(-1) * (b_CV.log_softmax(-1) - a_CV.log_softmax(-1))).sum(-1)
        yield TokenFigures(
            nll_a=-token_logprobs(a_CV, target_C).cpu(),
            nll_b=-token_logprobs(b_CV, target_C).cpu(),
            kl=kl_C.clamp(min=0).cpu(),  # rounding alone can take it below zero
            same_top=(a_CV.argmax(-1) == b_CV.argmax(-1)).cpu(),
        )


def greedy_divergence(a: Scorer, b: Scorer, windows: list[list[int]]) -> list[int]:
    """For each prompt (a window's beginning) how many greedy tokens agree before the first that differs."""
    prompts = [window[:PROMPT_TOKENS] for window in windows[: min(DIVERGENCE_PROMPTS, a.rows, b.rows)]]
    ours, theirs = (s.continue_greedily(prompts, DIVERGENCE_TOKENS) for s in (a, b))
    return [common_prefix(x, y) for x, y in zip(ours, theirs, strict=True)]


def common_prefix(x: list[int], y: list[int]) -> int:
    return next((i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q), len(x))


def layer_figures(a: Side, b: Side, window: list[int], weight_sqnrs_db: list[float]) -> list[dict[str, Any]]:
    """Per layer: SQNR (dB) of A's weights, and of its hidden states after the layer; None where nothing differs."""
    hidden_a, hidden_b = (hidden_states(side, window) for side in (a, b))
    return [
        {
            "layer": index,
            "weight_sqnr_db": finite(weights_db),
            "hidden_sqnr_db": finite(sqnr_db(hidden_b[index], hidden_a[index])),
        }
        for index, weights_db in enumerate(weight_sqnrs_db)
    ]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def weight_sqnrs_db(a: Transformer, b: Transformer) -> list[float]:
    """Of each layer, A's weights against B's. All ranks of a sharded model call it together."""
    sharded = is_sharded(a)
    return [weight_sqnr_db(ours, theirs, sharded=sharded) for ours, theirs in zip(a.layers, b.layers, strict=True)]


def weight_sqnr_db(a: nn.Module, b: nn.Module, *, sharded: bool = False) -> float:
    """Over all linear weights of two layers together, but not a mixture's router, which is never quantized."""
    routers = {m.gate for m in b.modules() if isinstance(m, MoE)}
    theirs = {name: m for name, m in b.named_modules() if isinstance(m, nn.Linear | Quantized) and m not in routers}
    ours = dict(a.named_modules())
    signal_and_noise = torch.zeros(2, dtype=torch.float64)
    for name, module in theirs.items():
        reference = dense(module).double()
        counted = len(reference) - getattr(module, "repeated", 0)  # each row of the model on one rank
        difference = (reference - dense(ours[name]).double())[:counted]
        reference = reference[:counted]
        signal_and_noise += torch.stack((reference.square().sum(), difference.square().sum())).cpu()
    signal, noise = (all_reduce(signal_and_noise) if sharded else signal_and_noise).tolist()
    return 10 * math.log10(signal / noise) if noise else math.inf


def dense(module: nn.Module) -> Tensor:
    return module.dequantize() if isinstance(module, Quantized) else module.weight  # type: ignore[return-value]


def hidden_states(side: Side, window: list[int]) -> list[Tensor]:
    """The output of every layer on one window, float32 [S, D], on the plain path."""
    outputs: list[list[Tensor]] = [[] for _ in side.model.layers]
    hooks = [
        layer.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output[0].float().cpu()))
        for layer, kept in zip(side.model.layers, outputs, strict=True)
    ]
    for _ in side.plain.logits([window]):
        pass
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in outputs]
