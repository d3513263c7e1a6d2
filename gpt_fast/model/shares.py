"""Who has what of a model that several ranks hold together: whole numbers only, the same on every rank.

Nothing is padded and no size has to be divided evenly. A KV head goes to one rank with all query heads that read it,
so a rank may have one KV head more than others. Only where there are more ranks than KV heads has each rank one of
them, which others have too, and divides its query heads with them. A rank's model is therefore an ordinary one, with
equally many query heads for each of its KV heads, and runs on any kernel.

Dividing the query heads of a KV head among two ranks that have others as well would be more even: 5 and 4 of 9 query
heads with 3 KV heads, instead of 6 and 3. But 3 query heads for one KV head and 2 for the next is a model that neither
`attend` nor a fused decoder knows, and padded to 3 and 3 it reads as much as 6 do.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from gpt_fast.config import ConfigError, ModelConfig

GRAIN = 32  # features and tokens are shared out in runs of this many, which suits kernels, or of a larger group's size
FINE = 16  # unless a rank then had fewer runs than this, so that the largest share is at most 1/16 above the average


class Share(NamedTuple):
    """One rank's query heads, KV heads and feed-forward features, and every rank's tokens of the vocabulary."""

    query: range
    kv: range
    features: range
    vocabulary: tuple[range, ...]

    def config(self, whole: ModelConfig) -> ModelConfig:
        """Of the rank's model; dim and vocabulary are the whole one's."""
        n_head, n_kv_head, intermediate_size = map(len, (self.query, self.kv, self.features))
        return dataclasses.replace(whole, n_head=n_head, n_kv_head=n_kv_head, intermediate_size=intermediate_size)


def share_out(config: ModelConfig, rank: int, size: int, *, group: int = 0) -> Share:
    """What rank `rank` of `size` has. group: of the feed-forward's inputs that share a scale; 0 where none do.

    ConfigError: there are more ranks than query heads, features or tokens.
    """
    for name in ("n_head", "intermediate_size", "vocab_size"):
        if (value := getattr(config, name)) < size:
            raise ConfigError(name, f"has none for some of {size} ranks", got=value, allowed=f"{value} ranks at most")
    query, kv = heads(config.n_head, config.n_kv_head, rank, size)
    features = runs(config.intermediate_size, size, group=group)[rank]
    return Share(query, kv, features, runs(config.vocab_size, size))


def heads(n_head: int, n_kv_head: int, rank: int, size: int) -> tuple[range, range]:
    """The rank's query heads and KV heads; each of the latter is read by as many of the former."""
    group = n_head // n_kv_head
    if size <= n_kv_head:
        kv = part(n_kv_head, rank, size)
        return range(kv.start * group, kv.stop * group), kv
    shared = rank * n_kv_head // size
    first, end = (-(-head * size // n_kv_head) for head in (shared, shared + 1))  # the ranks that have it
    own = part(group, rank - first, end - first)
    return range(shared * group + own.start, shared * group + own.stop), range(shared, shared + 1)


def runs(count: int, size: int, *, group: int = 0) -> tuple[range, ...]:
    """Each rank's run of `count` things, none empty; cut between groups or, for smaller shares, inside of them."""
    grain = max(group, GRAIN)
    while grain > 1 and count < grain * size * (1 if group and grain <= GRAIN else FINE):
        grain //= 2
    units = -(-count // grain)
    # Rounded down, where `part` rounds up: the ranks with fewer heads have more of these.
    edges = [min(rank * units // size * grain, count) for rank in range(size + 1)]
    return tuple(map(range, edges, edges[1:]))


def part(count: int, rank: int, size: int) -> range:
    """A run of count / size things, or of one more or fewer: sizes differ by one at most."""
    return range(-(-rank * count // size), -(-(rank + 1) * count // size))
