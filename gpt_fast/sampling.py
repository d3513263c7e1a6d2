"""From logits to a token: pure functions of (fp32 logits, per-row parameters, per-row uniforms).

Shapes: B rows, V vocabulary, C candidates. Nothing here mixes rows, so a request's token does not depend on its
neighbours; the uniforms are a hash of (seed, position), so it does not depend on history either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_fast.config import SamplingParams
from gpt_fast.request import NO_TOKEN

CANDIDATES = (128, 2048)  # sorted candidates looked at before a full sort; nearly every nucleus fits the first


class SamplingTensors(NamedTuple):
    """Per-row sampling parameters on the device; the meaning of each is SamplingParams's.

    most_k, by_p, by_min: what the host must know to choose shapes, and work to leave out, without asking the device:
    the largest top_k, whether some row has top_p without top_k, whether some row has min_p. The defaults are always
    right, and leave nothing out.
    """

    temperature_B: Tensor  # float32
    top_k_B: Tensor  # int64, 0: all
    top_p_B: Tensor  # float32
    min_p_B: Tensor  # float32
    most_k: int = 0
    by_p: bool = True
    by_min: bool = True

    def of(self, rows_N: Tensor) -> SamplingTensors:
        """Some of the rows, by index; a row may come several times."""
        return self._replace(**{name: getattr(self, name)[rows_N] for name in self._fields[:4]})


def sampling_tensors(params: Sequence[SamplingParams], device: torch.device) -> SamplingTensors | None:
    """Stack the rows' parameters; None when every row is greedy, so that the step is one argmax."""
    if all(p.temperature == 0 for p in params):
        return None
    rows = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]
    temperature_B, top_k_B, top_p_B, min_p_B = on_device(rows, device, torch.float64).unbind(-1)
    return SamplingTensors(
        temperature_B.float(),
        top_k_B.long(),
        top_p_B.float(),
        min_p_B.float(),
        most_k=max(p.top_k for p in params),
        by_p=any(p.top_p < 1 and not p.top_k for p in params),
        by_min=any(p.min_p for p in params),
    )


def on_device(values: list[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor on the device; to a GPU through pinned memory, so that the host does not wait."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sample(
    logits_BV: Tensor, params: SamplingTensors | None, uniform_B: Tensor | None, weight_BV: Tensor | None = None
) -> Tensor:
    """One token a row: argmax where temperature is 0 (or params is None), else inverse-CDF sampling.

    A row without a finite best logit (NaN or an infinity: the model overflowed) gets NO_TOKEN.

    Args:
        logits_BV: float32.
        uniform_B: float64 in [0, 1), one a row; see `uniform`. Not looked at where params is None.
        weight_BV: `weights` of the logits, where they are at hand.
    """
    if params is not None and weight_BV is None:
        weight_BV = weights(logits_BV, params)
    token_B = best_B = best_token(logits_BV)
    if weight_BV is not None and params is not None and uniform_B is not None:
        token_B = torch.where(params.temperature_B == 0, best_B, invert_cdf(weight_BV, uniform_B))
    finite_B = logits_BV.gather(-1, best_B[:, None])[:, 0].isfinite()
    return torch.where(finite_B, token_B, NO_TOKEN)


def best_token(logits_BV: Tensor, block: int = 256) -> Tensor:
    """The argmax, the place of a NaN if there is one: int64 [B].

    On the CPU by blocks, for its maximum is vectorized and its argmax is not: five rows of a verification would take
    as long as a layer of a small model.
    """
    rows, vocab = logits_BV.shape
    if logits_BV.device.type != "cpu" or vocab % block or rows == 0:
        return logits_BV.argmax(-1)
    blocks = logits_BV.reshape(rows, -1, block)
    block_B = blocks.amax(-1).argmax(-1)
    return block_B * block + blocks[torch.arange(rows), block_B].argmax(-1)


def probabilities(logits_BV: Tensor, params: SamplingTensors) -> Tensor:
    """The distribution a row samples from, float32 [B, V]; one-hot at the argmax where temperature is 0."""
    probs_BV = normalized(weights(logits_BV, params))
    one_hot_BV = torch.zeros_like(probs_BV).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
    return torch.where((params.temperature_B == 0)[:, None], one_hot_BV, probs_BV)


def normalized(weight_BV: Tensor) -> Tensor:
    return weight_BV / weight_BV.sum(-1, keepdim=True, dtype=torch.float64).float()


def weights(logits_BV: Tensor, params: SamplingTensors) -> Tensor:
    """Probabilities relative to the row's best token, 0 for what is cut off: float32 [B, V].

    Relative to the best, no temperature however small overflows, and min_p is a plain comparison. A row of temperature
    0 is treated as 1; its callers take the argmax.
    """
    temperature_B1 = torch.where(params.temperature_B == 0, 1.0, params.temperature_B)[:, None]
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B1
    weight_BV = scaled_BV.exp()
    kept_BV = weight_BV
    if params.by_min:
        kept_BV = kept_BV * (weight_BV >= params.min_p_B[:, None])
    if params.most_k or params.by_p:
        kept_BV = kept_BV * nucleus(scaled_BV, weight_BV, params)
    return kept_BV


def nucleus(scaled_BV: Tensor, weight_BV: Tensor, params: SamplingTensors) -> Tensor:
    """Which tokens top_k, then top_p (Holtzman et al., arXiv:1904.09751) keep: bool [B, V]; ties by lowest id.

    Both rules keep a prefix of the row sorted by probability, so each row reduces to a count.
    """
    vocab = scaled_BV.shape[-1]
    k_B = torch.where(params.top_k_B > 0, params.top_k_B, vocab).clamp(max=vocab)
    mass_B1 = weight_BV.sum(-1, keepdim=True, dtype=torch.float64)
    sizes = candidate_counts(params, vocab, on_cpu=scaled_BV.device.type == "cpu")
    for count in sizes:
        sorted_BC = scaled_BV.topk(count).values
        keep_B, undecided_B = nucleus_size(sorted_BC, k_B, mass_B1, params.top_p_B, vocab)
        if count == sizes[-1] or not bool(undecided_B.any()):
            break
    threshold_B1 = sorted_BC.gather(1, (keep_B - 1).clamp(max=sorted_BC.shape[1] - 1)[:, None])
    above_BV = scaled_BV > threshold_B1
    tied_BV = scaled_BV == threshold_B1
    room_B1 = keep_B[:, None] - above_BV.sum(-1, keepdim=True)
    chosen_BV = above_BV | (tied_BV & (tied_BV.cumsum(-1) <= room_B1))
    return chosen_BV | (keep_B >= vocab)[:, None]


def candidate_counts(params: SamplingTensors, vocab: int, *, on_cpu: bool) -> list[int]:
    """How many of the best tokens to sort, in the order to try; the last is always enough.

    Few nearly always hold the nucleus and cost little to find. Whether they did is a look at the device, which only
    the CPU gives without waiting; elsewhere there is one attempt.
    """
    most_k = min(params.most_k, vocab)
    if not params.by_p:
        return [most_k]
    return [*(max(c, most_k) for c in CANDIDATES if on_cpu and c < vocab and most_k < vocab), vocab]


def nucleus_size(sorted_BC: Tensor, k_B: Tensor, mass_B1: Tensor, top_p_B: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """How many of the best tokens each row keeps, and which rows had too few candidates to tell.

    Sums are float64 prefix sums: a row's answer must not depend on how many candidates its neighbours asked for.
    """
    count = sorted_BC.shape[1]
    rank_C = torch.arange(count, device=sorted_BC.device)
    weight_BC = sorted_BC.exp().double()
    mass_BC = weight_BC.cumsum(-1)
    mass_of_k_B1 = mass_BC.gather(1, (k_B - 1).clamp(max=count - 1)[:, None])
    total_B1 = torch.where((k_B < vocab)[:, None], mass_of_k_B1, mass_B1)
    in_p_BC = mass_BC - weight_BC < top_p_B.double()[:, None] * total_B1
    by_p_B = (in_p_BC & (rank_C < k_B[:, None])).sum(-1).clamp(min=1)
    keep_B = torch.where(top_p_B < 1, by_p_B, k_B)
    undecided_B = (k_B > count) & torch.where(top_p_B < 1, by_p_B == count, k_B < vocab)
    return keep_B, undecided_B


def invert_cdf(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative weight passes that share of the row's total: int64 [B].

    Weights need not add up to 1. As uniform <= 1 - 2^-53, the target stays below the total, and right=True steps over
    tokens of weight 0.
    """
    cdf_BV = weight_BV.cumsum(-1, dtype=torch.float64)
    index_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]
    return index_B.clamp(max=weight_BV.shape[-1] - 1)  # a row of NaN


def uniform(seed_B: Tensor, position_B: Tensor, stream: int = 0) -> Tensor:
    """Counter-based uniforms in [0, 1), float64: a hash of (seed, position, stream), equal on every device.

    Two rounds of SplitMix64's finalizer (Steele, Lea, Flood, OOPSLA 2014). `stream` separates the draws that
    one position needs (a sample, an acceptance test, ...).
    """
    counter_B = position_B * 4 + stream
    return (_shift(_mix(_mix(seed_B) ^ (counter_B * -7046029254386353131)), 11)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# ------------------------------------------------------------------- edits of one row before sampling


def edit_logits(
    logits_V: Tensor, params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int], eos_ids: Sequence[int]
) -> Tensor:
    """Penalties, bias, min_tokens and the guide on one row. Formulas: CTRL (arXiv:1909.05858) for repetition, OpenAI's
    for presence and frequency (over the output only)."""
    logits_V = logits_V.clone()
    if params.repetition_penalty != 1.0 and (prompt or output):
        seen = torch.tensor(sorted({*prompt, *output}), device=logits_V.device)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and output:
        ids, counts = torch.tensor(output, device=logits_V.device).unique(return_counts=True)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids, biases = params.bias_arrays
        ids_N = torch.frombuffer(ids, dtype=torch.int64).to(logits_V.device)
        logits_V[ids_N] += torch.frombuffer(biases, dtype=torch.float32).to(logits_V.device)
    if len(output) < params.min_tokens and (eos_ids or params.stop_token_ids):
        logits_V[[*eos_ids, *params.stop_token_ids]] = float("-inf")
    if params.guide is not None:
        allowed_V = torch.frombuffer(bytearray(params.guide.allowed(output)), dtype=torch.uint8)
        logits_V = logits_V.masked_fill(allowed_V.to(logits_V.device) == 0, float("-inf"))
    return logits_V


def needs_edit(params: SamplingParams, output_length: int) -> bool:
    """Whether `edit_logits` would change anything for this row now."""
    penalized = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    return bool(penalized or params.logit_bias or params.guide is not None or output_length < params.min_tokens)
