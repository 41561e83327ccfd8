"""Keys and queries of one attention head with the statistics of a real one, of any length and the same for a seed.

What makes attention keys hard to search, and is here: tokens follow Zipf's law and come in passages about topics; keys
are rotated by their position (RoPE), so only slowly rotating dimensions carry meaning over a distance; a few channels
are offset far from zero; the first four keys are sinks; and queries are drawn from elsewhere than keys (only part of a
query is about any token, the rest lies where no key does), so that a query's best keys are not neighbours of one
another. How concentrated attention is differs from head to head: ``KINDS``.

Sources of these facts: RetrievalAttention (arXiv 2409.10516, queries out of distribution), StreamingLLM (arXiv
2309.17453, sinks), KIVI (arXiv 2402.02750, outlier channels of keys), RoPE: arXiv 2104.09864.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from alaya_tiers.errors import ConfigError

CHUNK = 8192
"""Keys that are drawn together."""

SINKS, SINK_LENGTH = 4, 12.0
TOPICS = 128
VOCABULARY = 32_768
PASSAGE = 512
"""Tokens about one topic."""

THETA = 500_000.0
"""Base of the rotation, as in Llama 3."""

_SAMPLE = 4 * CHUNK


@dataclass(frozen=True, slots=True)
class Kind:
    """What a head attends to.

    spread: standard deviation of its scores (scaled): how concentrated it is. token, topic: how much of a query is
    about one token, and about one topic. sink: score of the sinks above the mean, in spreads.
    """

    spread: float
    token: float
    topic: float
    sink: float


KINDS = {
    "sharp": Kind(5.0, 1.0, 0.3, 3.0),
    "topical": Kind(3.5, 0.4, 1.0, 3.5),
    "medium": Kind(2.5, 0.6, 0.6, 4.5),
    "diffuse": Kind(1.5, 0.3, 0.3, 4.0),
}
"""Kinds of heads, from concentrated to spread out. They share their keys: what differs is what queries look for."""


@dataclass(frozen=True)
class Head:
    """One kv head and the query heads that share it. Raises ConfigError."""

    dim: int = 128
    group: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 8 or self.dim % 2 or self.group < 1:
            raise ConfigError("a head has an even number of dimensions, at least 8, and at least one query")

    def keys(self, tokens: int) -> Tensor:
        """The first so many keys, float32 [tokens, dim]."""
        out = torch.empty(tokens, self.dim)
        for start in range(0, tokens, CHUNK):
            out[start : start + CHUNK] = self.chunk(start // CHUNK)[: tokens - start]
        return out

    def chunk(self, number: int) -> Tensor:
        """Keys number x CHUNK and on, float32 [CHUNK, dim]."""
        make = self._random(1, number)
        rank = _zipf(torch.rand(CHUNK, generator=make))
        topic = torch.randint(TOPICS, (CHUNK // PASSAGE,), generator=make).repeat_interleave(PASSAGE)
        word = self._word(rank, topic)
        noise = torch.randn(CHUNK, self.dim, generator=make)
        meaning = 0.8 * self._tokens[word] + 0.5 * self._topics[topic]
        keys = self._offset + meaning * self._slow + 0.6 * noise
        keys = _rotated(keys, torch.arange(CHUNK) + number * CHUNK)
        keys -= (keys @ self._sink)[:, None] * self._sink
        if number == 0:
            keys[:SINKS] = SINK_LENGTH * self._sink + 0.3 * noise[:SINKS]
        return keys

    def queries(self, kind: Kind, step: int, tokens: int) -> Tensor:
        """Queries of a kind of head, some steps after so many tokens, float32 [group, dim]. A topic lasts 4 steps."""
        topic = torch.randint(TOPICS, (self.group,), generator=self._random(2, step // 4))
        make = self._random(3, step)
        rank = _zipf(0.9 * torch.rand(self.group, generator=make) + 0.1)
        about = kind.token * self._tokens[self._word(rank, topic)] + kind.topic * self._topics[topic]
        own = torch.randn(self.group, self.dim, generator=make)
        query = _rotated(about * self._slow + 0.4 * own, torch.full((self.group,), tokens + step))
        query = query / (query @ self._sample.T).std(1, keepdim=True) * (kind.spread * math.sqrt(self.dim))
        wanted = (query @ self._sample.T).mean(1) + kind.sink * kind.spread * math.sqrt(self.dim)
        return query + (wanted / SINK_LENGTH - query @ self._sink)[:, None] * self._sink

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.randn(VOCABULARY, self.dim, generator=self._random(4))

    @cached_property
    def _topics(self) -> Tensor:
        return torch.randn(TOPICS, self.dim, generator=self._random(5))

    @cached_property
    def _slow(self) -> Tensor:
        """Weight of meaning in each dimension: little where the rotation is fast."""
        speed = _speeds(self.dim)
        return torch.cat([weight := 1 / (1 + (speed * 3000) ** 0.5), weight]) * 2.5

    @cached_property
    def _offset(self) -> Tensor:
        """Mean of the keys before rotation: a few slow channels far out."""
        make = self._random(6)
        out = 0.3 * torch.randn(self.dim, generator=make)
        far = torch.randperm(self.dim // 4, generator=make)[: max(1, self.dim // 32)]
        slowest = torch.cat([torch.arange(self.dim // 4, self.dim // 2), torch.arange(3 * self.dim // 4, self.dim)])
        out[slowest[far]] += 8.0 * torch.randn(far.numel(), generator=make).sign()
        return out

    @cached_property
    def _sink(self) -> Tensor:
        """Where the sinks lie, at right angles to all other keys."""
        return functional.normalize(torch.randn(self.dim, generator=self._random(7)), dim=0)

    @cached_property
    def _sample(self) -> Tensor:
        return torch.cat([self.chunk(i * 7)[SINKS::4] for i in range(_SAMPLE // CHUNK)])

    def _word(self, rank: Tensor, topic: Tensor) -> Tensor:
        """Token of a rank in passages of a topic: half of the rarer ones are the topic's own."""
        own = (rank > 200) & (rank % 2 == 0)
        return torch.where(own, (rank + 131 * topic) % VOCABULARY, rank)

    def _random(self, *of: int) -> torch.Generator:
        number = self.seed
        for part in of:
            number = (number * 1_000_003 + part + 1) % (1 << 62)
        return torch.Generator().manual_seed(number)


def _zipf(uniform: Tensor) -> Tensor:
    """Ranks by Zipf's law with exponent 1 over the vocabulary, from numbers in [0, 1)."""
    return (VOCABULARY**uniform).long().clamp_max(VOCABULARY) - 1


def _speeds(dim: int) -> Tensor:
    return THETA ** -(torch.arange(0, dim, 2) / dim)


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE in the form of two halves. x: [n, dim], positions: [n]."""
    angle = positions[:, None].double() * _speeds(x.shape[1]).double()
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
