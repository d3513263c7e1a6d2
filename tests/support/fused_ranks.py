"""What each of torchrun's ranks runs of tests/ops_cpu/test_linked_ranks.py: the fused decoder of its share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

KINDS = ("bfloat16", "int8", "int4")


def main() -> None:
    import torch

    from gpt_fast.engine.ranks import join
    from gpt_fast.ops.cpu import link

    directory, group = Path(sys.argv[1]), join()
    with group.one_voice():
        found: dict[str, Any] = {}
        try:
            link.join(group.ranks, threads=1, refusal="no room" if group.ranks.rank == 1 else None)
        except link.LinkRefused as error:
            found["refused"] = str(error)
        joined = link.join(group.ranks, threads=1)
        found |= {kind: logits_and_tokens(share_of(kind, group.ranks, joined)) for kind in KINDS}
        torch.save(found, directory / f"{group.ranks.rank}.pt")


def model_of(kind: str) -> Any:
    """A model that 2, 3 or 4 ranks can share, whose matrices are of one kind."""
    from support.cpu_models import CPU, MAX_SEQ_LEN, small_model
    from support.quantized import quantized_model

    model = small_model(n_head=12, n_kv_head=12, head_dim=32, intermediate_size=384, vocab_size=3600)
    if kind != "bfloat16":
        model = quantized_model(model, mode=kind, groupsize=32, embedding="int8").eval()
    model.setup_rope(MAX_SEQ_LEN, CPU)
    return model


def share_of(kind: str, ranks: Any, joined: Any) -> Any:
    from gpt_fast.model.parallel import shard
    from gpt_fast.ops.cpu import CpuDecoder

    model = model_of(kind)
    shard(model, ranks)
    return CpuDecoder(model, weights=kind, threads=1, link=joined)


def logits_and_tokens(decoder: Any) -> tuple[Any, Any]:
    """Logits [60, V] of a text in chunks, then the tokens [20] that follow it, each step begun behind the last."""
    import torch

    from gpt_fast.model.forward import Batch
    from support.cpu_models import MAX_SEQ_LEN, new_cache, random_tokens, run_chunks

    cache, step, steps = new_cache(decoder, fill=torch.nan), None, []
    logits_TV = run_chunks(decoder.forward, random_tokens(decoder, 60), cache, [40, 1, 19])
    first = logits_TV[-1:].argmax(-1)[:, None]
    for at in range(60, 80):
        step = decoder.start(Batch(first, torch.tensor([[at]]), cache, MAX_SEQ_LEN), after=step, best_only=True)
        steps.append(step)
    return logits_TV, torch.cat([step.best()[0] for step in steps])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it, to find support
    main()
