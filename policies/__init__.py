"""Pure decisions: which blocks leave a tier, which are read ahead, which are written behind.

A policy is a frozen dataclass with one pure method, view -> plan. Names exist for settings files only.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from alaya_tiers.errors import ConfigError
from alaya_tiers.policies.ahead import NextInOrder, NoPrefetch
from alaya_tiers.policies.base import (
    EvictionPolicy,
    EvictionView,
    Guess,
    GuessPolicy,
    GuessView,
    PrefetchPolicy,
    PrefetchView,
    WritePolicy,
    WriteView,
)
from alaya_tiers.policies.guess import SOURCES, UNSEEN, Confident, From, NoGuess
from alaya_tiers.policies.heat import Cost, Heat
from alaya_tiers.policies.lru import Lru
from alaya_tiers.policies.reuse import Always, Cheaper, Never, Reuse, ReusePolicy, ReuseView
from alaya_tiers.policies.s3fifo import S3Fifo
from alaya_tiers.policies.scan import Scan
from alaya_tiers.policies.shares import Patience, PauseView, Share, Shares, StoredView
from alaya_tiers.policies.watermark import Watermark
from alaya_tiers.policies.window import Window

__all__ = [
    "EVICTION",
    "GUESS",
    "PREFETCH",
    "REUSE",
    "SOURCES",
    "UNSEEN",
    "Always",
    "Cheaper",
    "Confident",
    "Cost",
    "EvictionPolicy",
    "EvictionView",
    "From",
    "Guess",
    "GuessPolicy",
    "GuessView",
    "Heat",
    "Lru",
    "Never",
    "NextInOrder",
    "NoGuess",
    "NoPrefetch",
    "Patience",
    "PauseView",
    "PrefetchPolicy",
    "PrefetchView",
    "Reuse",
    "ReusePolicy",
    "ReuseView",
    "S3Fifo",
    "Scan",
    "Share",
    "Shares",
    "StoredView",
    "Watermark",
    "Window",
    "WritePolicy",
    "WriteView",
    "by_name",
]

EVICTION: dict[str, type[EvictionPolicy]] = {
    "lru": Lru, "scan": Scan, "s3fifo": S3Fifo, "heat": Heat, "cost": Cost
}  # fmt: skip
PREFETCH: dict[str, type[PrefetchPolicy]] = {"none": NoPrefetch, "next": NextInOrder}
REUSE: dict[str, type[ReusePolicy]] = {"auto": Cheaper, "always": Always, "never": Never}
GUESS: dict[str, Callable[[], GuessPolicy]] = {
    "none": NoGuess, "confident": Confident, **{source: partial(From, source) for source in SOURCES}
}  # fmt: skip

P = TypeVar("P")


def by_name(known: Mapping[str, Callable[[], P]], name: str) -> P:
    """The policy a settings file names; ConfigError that lists the known ones otherwise."""
    if name not in known:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(sorted(known))}")
    return known[name]()
