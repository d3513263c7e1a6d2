"""A CUDA graph of what a function does, or the function itself where there are no CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Captured:
    """`replay()` does what calling `run` did: as one CUDA graph on a GPU, by calling it elsewhere.

    run: may only read and write tensors that stay where they are, and must not synchronize. It is called twice here
    (kernels compile at the first call), so whatever it changes must be set afterwards.
    """

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.replay: Callable[[], object] = run
        if device.type != "cuda":
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using the device: their calls are no error of this capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            run()
        self.replay = graph.replay
