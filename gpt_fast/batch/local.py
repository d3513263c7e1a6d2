"""Workers on this machine: in this process where one is enough, else a process each."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess

import torch

from gpt_fast.batch.answering import Answering, Plan
from gpt_fast.batch.crew import Counter, Post, work
from gpt_fast.batch.dealer import Dealer
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.llm import Engine
from gpt_fast.serve.startup import available_cores, prepare

logger = logging.getLogger(__name__)


def answer_here(dealer: Dealer, config: EngineConfig, plan: Plan) -> None:
    """In this process."""
    config = prepare(dataclasses.replace(config, threads=config.threads or available_cores()), None)
    Answering(Engine.load(**vars(config)), plan, partial(dealer.trade, "here")).run()


def answer_in_processes(dealer: Dealer, config: EngineConfig, plan: Plan, count: int) -> None:
    """In `count` of them, which share cores or GPUs. One that dies leaves its rows to the others.

    Raises ValueError where a worker cannot load.
    """
    shares = share_out(config, count)
    with Counter(dealer) as counter:
        posts = [Post(counter.address, counter.key, share, plan) for share in shares]
        with started(posts) as workers:
            for worker in workers:
                worker.join()
                if worker.exitcode:
                    logger.warning("%s died (exit code %d): its lines go to the others", worker.name, worker.exitcode)
    if counter.failure:
        raise ValueError(counter.failure)


def share_out(config: EngineConfig, count: int) -> list[EngineConfig]:
    """Each worker's part of the machine: its own GPU, or as many cores as the others have."""
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    if gpus:
        if count > gpus:
            raise ConfigError("--workers", "must have a GPU each", got=count, allowed=f"1..{gpus}")
        return [dataclasses.replace(config, device=f"cuda:{i}") for i in range(count)]
    cores = available_cores()
    if count > cores:
        raise ConfigError("--workers", "must have a core each", got=count, allowed=f"1..{cores}")
    return [dataclasses.replace(config, threads=config.threads or cores // count)] * count


@contextmanager
def started(posts: list[Post]) -> Iterator[list[SpawnProcess]]:
    """A process for each, ended on the way out."""
    spawn = get_context("spawn")
    workers = [
        spawn.Process(target=begin, args=(post, f"worker {i}"), name=f"worker {i}") for i, post in enumerate(posts)
    ]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def begin(post: Post, name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for who started us, whose end is ours
    work(post, name)
