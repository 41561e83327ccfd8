"""The optimizer: for each kv head of a layer, look for the keys that matter or read all, by what either would cost.

    flat         read every key and value in order: exact
    codes        scan the codes, attend to what is within reach (DIPR), estimate the rest
    coarse       the same, of those parts alone that by their summary may hold something within reach
    .., most     either with at most so many keys for each head, where a limit of keys, bytes or time asks for it

Graphs and clusters by k-means are no plans: on no keys that were measured were they the fastest
(docs/decisions/006-codes-before-graphs.md).
A step's cost is predicted from bytes and the machine's rates, and from how many keys each head found lately.
Source: AlayaDB (arXiv 2504.10326), 6.2, has rules here; a cost model is what it leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import PAGE
from alaya_tiers.config import Settings

Heads = npt.NDArray[np.float64]

NEARER = 0.1
"""By how much a head's reach shrinks in a step that had more than enough, in units of scores."""

LONGEST_PAUSE = 63
"""Steps in a row that a head reads everything without asking whether it still must."""

SUMMARIES = 0.35
"""Seconds to compare with a summary, over those to scan the codes it stands for."""

APART = 2.0
"""A head that never looked by parts is believed to look at so many for each that holds what it found."""

PRIMED_PAUSE = 7
"""The same at first, of a head that needs nearly everything as samples say: as after three looks in vain."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does, all threads together.

    read, ssd: bytes a second of K and V in memory, and from the disk. scan: numbers of codes a second, whatever their
    bits. pick: seconds of a key found singly. page: seconds of a page read singly from the disk, many under way. look:
    seconds of each head that looks, beside its codes and keys.
    """

    read: float
    scan: float
    pick: float
    ssd: float
    page: float = 15e-6
    look: float = 0.0

    @classmethod
    def believed(cls, settings: Settings, heads: int) -> Rates:
        """What the settings say of this machine, for a layer of so many kv heads."""
        s = settings
        look = s.look_seconds / heads
        return cls(s.read_rate, s.scan_rate, s.pick_seconds, s.ssd_rate, s.page_seconds, look)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a layer would touch for each of its kv heads.

    everything: bytes of K and V it sees; window: of these, what is attended in any case. codes: numbers it would scan,
    tokens x dims. row: bytes of one token's K and V; block: of one block's. blocks: how many there are, and ``cold``
    the share of them on disk. missed: of the keys found there, the share whose page must be read; None where blocks are
    read whole. codes_cold: bytes of codes that are on disk alone: they are looked at by parts, or not at all.
    """

    everything: float
    window: float
    codes: float
    row: float
    block: float
    blocks: int
    cold: float
    missed: float | None = None
    codes_cold: float = 0.0

    def flat(self, rates: Rates) -> float:
        """Seconds to read everything."""
        return self.everything * (1 / rates.read + self.cold / rates.ssd)

    def scan(self, rates: Rates) -> float:
        """Seconds for the window and the codes."""
        return rates.look + self.window / rates.read + self.codes / rates.scan

    def coarse(self, share: Heads, rates: Rates) -> Heads:
        """The same for the window, all summaries, and the codes of such a share of the parts, in two scans."""
        scanned = self.codes / rates.scan
        read = share * self.codes_cold / rates.ssd
        return np.asarray(2 * rates.look + self.window / rates.read + scanned * (SUMMARIES + share) + read)

    def picks(self, found: Heads, rates: Rates) -> Heads:
        """Seconds for so many keys found singly, each in a page of its own, or a block while there are blocks."""
        loads = found if self.missed is not None else np.minimum(found, self.blocks)
        return np.asarray(found * (rates.pick + self.row / rates.read) + loads * self.cold * self._load(rates))

    def _load(self, rates: Rates) -> float:
        """Seconds to have one key from disk."""
        return self.block / rates.ssd if self.missed is None else self.missed * rates.page

    def dear(self, found: Heads, rates: Rates) -> npt.NDArray[np.bool_]:
        """Of heads that have scanned and found so many keys, which had better read everything now."""
        return np.asarray(self.picks(found, rates) + self.window / rates.read > self.flat(rates))

    def most(self, seconds: float, rates: Rates) -> int:
        """How many keys found singly fit into so much time, after window and codes."""
        left = seconds - self.scan(rates)
        each = rates.pick + self.row / rates.read + self.cold * self._load(rates)
        return max(0, int(left / each))

    def fitting(self, nbytes: float) -> int:
        """How many keys found singly so many bytes hold: K and V, and of those on disk the page or the block too."""
        return int(nbytes / (self.row + self.cold * (self.block if self.missed is None else self.missed * PAGE)))


class Limit(NamedTuple):
    """What a step of one layer may take; None: what the keys within reach take.

    seconds. nbytes: of keys and values, beside the window. most: keys that each head may find.
    """

    seconds: float | None = None
    nbytes: float | None = None
    most: int | None = None

    @classmethod
    def of(cls, settings: Settings, layers: int) -> Limit:
        """What the settings allow each of so many layers."""
        seconds, nbytes = settings.attention_target, settings.attention_budget
        return cls(
            None if seconds is None else seconds / layers,
            None if nbytes is None else nbytes / layers,
            settings.most_selected,
        )


class Choice(NamedTuple):
    """The plan of a step. look: bool [kv_heads], which heads scan codes. most: keys each of them may find. coarse:
    bool [kv_heads], which of those leave out parts by their summaries.

    bound: nobody may read everything, even where that were faster: it would be more bytes than allowed, or what is
    found is recorded.
    """

    look: npt.NDArray[np.bool_]
    most: int | None
    coarse: npt.NDArray[np.bool_]
    bound: bool = False


class History:
    """What the kv heads of a layer needed lately, and the plan of its next step.

    Where reading all in order is faster than to scan, whatever is found, nobody looks. A head with so many keys within
    reach that it is faster does so too, and is asked again after ``pause`` steps, each time twice as many.
    """

    def __init__(self, heads: int) -> None:
        self.found = np.zeros(heads)
        """Keys that each head found when it looked last."""
        self.far = np.zeros(heads)
        """How far below its best each head has had to look lately, in units of scores; at least what alpha says."""
        self.pause, self.left = np.zeros(heads, np.int64), np.zeros(heads, np.int64)
        self.choice = Choice(np.zeros(heads, bool), None, np.zeros(heads, bool))
        self.parts = np.ones(heads)
        """Share of the parts that each head looked at when it looked by parts last, or probably would."""
        self.parts_pause, self.parts_left = np.zeros(heads, np.int64), np.zeros(heads, np.int64)
        self.tokens = 0
        """Tokens that the last step saw."""
        self.predicted = self.measured = 0.0
        """Seconds of the last step: as planned, and as it was."""
        self.why = ""
        """Why no head looked in the last step, if none did."""
        self.mass, self.used = np.ones(heads), np.zeros(heads)
        """Of the last step: share of the attention that each head attended and did not estimate, in the worst of its
        queries; tokens that it attended."""
        self.gave_up = 0
        """Heads that looked in the last step, found too much and read everything."""
        self._primed = False

    def prime(self, found: Heads) -> None:
        """What each head is likely to find, before it looked for the first time."""
        self.found, self._primed = np.asarray(found, np.float64).copy(), True

    def plan(
        self, step: Step, rates: Rates, limit: Limit, *, recorded: bool = False, summaries: bool = False
    ) -> Choice:
        """What the next step does. summaries: whether parts can be left out. recorded: every head looks, at everything,
        so that other plans can be replayed.
        """
        if self._primed:
            dear = step.picks(self.found, rates) + step.scan(rates) > step.flat(rates)
            self.pause, self.left, self._primed = dear * PRIMED_PAUSE, dear * PRIMED_PAUSE, False
        look, coarse = self.left == 0, self._coarse(step, rates, recorded=recorded) & summaries
        scanned = np.where(coarse, step.coarse(self.parts, rates), step.scan(rates))
        slow = scanned >= step.flat(rates)
        self.left[~look] -= 1
        look &= ~slow
        most = [] if limit.most is None else [limit.most]
        if limit.seconds is not None:
            most.append(step.most(limit.seconds / look.size, rates))
        if limit.nbytes is not None:
            most.append(step.fitting(limit.nbytes / look.size))
        too_much = limit.nbytes is not None and look.size * (step.everything - step.window) > limit.nbytes
        bound = recorded or too_much
        look |= bound
        self.parts_left[look & (self.parts_left > 0)] -= 1
        self.choice = Choice(look, min(most, default=None), coarse & look, bound)
        found = np.minimum(self.found, min(most, default=math.inf))
        looked = scanned + step.picks(found, rates)
        self.predicted = float(np.where(look, looked, step.flat(rates)).sum())
        nearly_all = "found nearly all keys within reach lately, and asks again later"
        self.why = "" if look.any() else "to look would take longer than to read all" if slow.all() else nearly_all
        return self.choice

    def failed(self, why: str) -> None:
        """The codes that were planned for cannot be had: nobody looks for a while, longer each time."""
        self.exact(why, self.tokens)
        self.pause = np.minimum(LONGEST_PAUSE, 2 * self.pause + 1)
        self.left = self.pause.copy()

    def _coarse(self, step: Step, rates: Rates, *, recorded: bool) -> npt.NDArray[np.bool_]:
        """Which heads look by parts, if they look."""
        if step.codes_cold or recorded:
            return np.full(self.parts.size, step.codes_cold > 0)
        return np.asarray(self.lies_together(step, rates) & (self.parts_left == 0))

    def lies_together(self, step: Step, rates: Rates) -> npt.NDArray[np.bool_]:
        """Which heads find what they want in so few parts that to look by parts is faster, as far as is known."""
        return np.asarray(step.coarse(self.parts, rates) < step.scan(rates))

    def exact(self, why: str, tokens: int) -> None:
        """The next step reads all of so many tokens, unplanned: why."""
        nobody = np.zeros(self.found.size, bool)
        self.choice, self.why, self.predicted = Choice(nobody, None, nobody), why, 0.0
        self.note_all(tokens)

    def note_all(self, tokens: int) -> None:
        """Every head reads so many tokens, all there are."""
        self.tokens, self.gave_up, self.mass[:], self.used[:] = tokens, 0, 1.0, tokens

    def note(self, share: npt.NDArray[np.floating], used: npt.NDArray[np.number], dear: npt.NDArray[np.bool_]) -> None:
        """What came of the plan, of the heads that looked. share, used: see mass, used; dear: who read everything."""
        look = self.choice.look
        self.mass[look], self.used[look] = np.where(dear, 1.0, share), np.where(dear, self.tokens, used)
        self.gave_up = int(dear.sum())

    def deepen(self, heads: npt.NDArray[np.intp], far: Heads, ample: npt.NDArray[np.bool_], least: float) -> None:
        """Note how far some heads looked; those with more than they need will look a little less far, not below least.

        heads: numbers of kv heads; far, ample: of each.
        """
        self.far[heads] = np.maximum(least, far - np.where(ample, NEARER, 0.0))

    def note_parts(self, heads: npt.NDArray[np.intp], share: Heads, step: Step, rates: Rates) -> None:
        """Note the share of the parts that these heads found something in or, if they looked by parts, looked at."""
        coarse = self.choice.coarse[heads]
        self.parts[heads] = np.where(coarse, share, np.minimum(1.0, APART * share))
        slow = coarse & ~self.lies_together(step, rates)[heads]
        pause = np.where(slow, np.minimum(LONGEST_PAUSE, 2 * self.parts_pause[heads] + 1), 0)
        self.parts_pause[heads] = np.where(coarse, pause, self.parts_pause[heads])
        self.parts_left[heads] = np.where(slow, pause, self.parts_left[heads])

    def judge(self, found: Heads, flat: npt.NDArray[np.bool_], step: Step, rates: Rates) -> None:
        """Note what the heads that looked found, and which of them had to read everything after all."""
        look = self.choice.look
        scanned = np.where(self.choice.coarse[look], step.coarse(self.parts[look], rates), step.scan(rates))
        dear = flat | (step.picks(found, rates) + scanned > step.flat(rates))
        self.found[look] = found
        self.pause[look] = np.where(dear, np.minimum(LONGEST_PAUSE, 2 * self.pause[look] + 1), 0)
        self.left[look] = self.pause[look]
