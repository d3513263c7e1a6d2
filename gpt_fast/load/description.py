"""What was chosen while an engine was loaded, for the log, the user and the commands that measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class EngineDescription:
    """Its fields, in this order, are what the log and generate print.

    quantization: the weights' mode, "none" for plain ones. path: which kernels run, and why no faster ones do.
    tuning: see load.path.ModelPath. threads are the kernels', torch_threads those of PyTorch's own operators.
    weight_bytes_per_step: weights that one decode step reads; greedy_bytes_per_step: where all rows are greedy and few.
    """

    checkpoint: str
    quantization: str
    path: str
    tuning: str
    device: str
    threads: int
    torch_threads: int
    dtype: str
    kv_cache: str
    kv_cache_gib: float
    max_seq_len: int
    max_num_seqs: int
    speculate: str
    weight_bytes_per_step: int
    greedy_bytes_per_step: int
    load_seconds: float

    def as_dict(self) -> dict[str, str | int | float]:
        return asdict(self)
