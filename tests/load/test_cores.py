"""Ranks on cores of their own, with affinities of real processes."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from gpt_fast.load.cores import by_place, place, settle, share
from gpt_fast.model.parallel import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no affinities")


@given(st.integers(1, 16), st.integers(0, 40))
def test_every_core_is_one_ranks(size: int, more: int) -> None:
    shares = [share(range(size + more), Ranks(rank, size)) for rank in range(size)]
    assert [core for cores in shares for core in cores] == list(range(size + more)) and all(shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_threads_of_a_core_and_cores_of_a_socket_stay_together() -> None:
    """Two sockets of two cores of two threads, as Linux numbers them: first threads first."""
    ordered = by_place(range(8), lambda core: (core // 2 % 2, core % 2))
    assert ordered == [0, 4, 1, 5, 2, 6, 3, 7]
    assert by_place([3, 0], lambda core: ()) == [0, 3]
    assert place(0) and place(10**9) == ()


def settled(allowed: list[set[int]], first: int) -> list[set[int]]:
    """Where ranks of one machine may run after `settle`, each a thread that may run on its `allowed` before."""
    store, found = HashStore(), [set[int]()] * len(allowed)

    def run(local: int) -> None:
        os.sched_setaffinity(0, allowed[local])  # this thread's
        size = len(allowed)
        group: Any = SimpleNamespace(ranks=Ranks(first + local, first + size), local=Ranks(local, size), store=store)
        settle(group)
        found[local] = os.sched_getaffinity(0)

    threads = [threading.Thread(target=run, args=(local,)) for local in range(len(allowed))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("first", [0, 3])  # of several machines, this one's first rank
def test_ranks_divide_the_cores_that_all_of_them_may_use(first: int) -> None:
    here = os.sched_getaffinity(0)
    if len(here) < 2:
        pytest.skip("one core")
    one, two = settled([here, here], first)
    assert one | two == here and not one & two
    assert os.sched_getaffinity(0) == here  # the others' threads keep theirs


def test_what_the_operator_chose_stays_and_so_do_ranks_without_cores() -> None:
    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        pytest.skip("one core")
    assert settled([set(here), set(here[:1])], 0) == [set(here), set(here[:1])]  # numactl's, of one rank
    many = [set(here)] * (len(here) + 1)
    assert settled(many, 0) == many
