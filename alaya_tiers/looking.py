"""Scans of one attention: each kv head's codes, all of them or by parts, as its plan says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers.index.codes import Reach, Scan, Verify, scan
from alaya_tiers.index.summary import PART, scan_parts
from alaya_tiers.layer import Divided
from alaya_tiers.listed import Asked, part_of
from alaya_tiers.partitions import Partitions
from alaya_tiers.view import Heads


class NoCodes(Exception):
    """Codes that are on disk cannot be had: the step is done without them."""


class Scans:
    """What heads of one attention scan. coarse: bool [kv_heads], which of them by parts.

    verify: for some heads, see index.codes.Verify.
    """

    def __init__(
        self,
        asked: Asked,
        divided: Divided,
        coarse: npt.NDArray[np.bool_],
        reach: Reach,
        verify: Callable[[Heads], Verify],
        partitions: Partitions,
    ) -> None:
        self._asked, self._divided, self._coarse, self._reach = asked, divided, coarse, reach
        self._verify, self._partitions, self._scratch = verify, partitions, partitions.scratch
        self._deviations = asked.state.engine.settings.index_parts or None
        self._held: object = None
        self.nbytes = 0
        """Of codes that were scanned."""
        self.parts = np.ones(coarse.size)
        """Share of the parts that a head found something in, or looked at where it looked by parts."""
        self._every = max(1, -(-int(divided.middle.count.sum()) // PART))

    def of(self, heads: Heads, seed: torch.Tensor, far: npt.NDArray[np.float64]) -> Scan:
        """What these kv heads find within a distance of their best. seed: see index.codes.scan; far: of each."""
        coarse = self._coarse[heads]
        if coarse.all() or not coarse.any():
            return (self._by_parts if coarse.all() else self._all)(heads, seed, far)
        both = np.flatnonzero(coarse), np.flatnonzero(~coarse)
        parts, whole = (
            one(heads[some], seed[torch.from_numpy(some)], far[some])
            for one, some in zip((self._by_parts, self._all), both, strict=True)
        )
        order = np.argsort(np.concatenate(both))
        tokens = [*parts.tokens, *whole.tokens]
        rest = (torch.cat(pair)[torch.from_numpy(order)] for pair in zip(parts[1:], whole[1:], strict=True))
        return Scan([tokens[i] for i in order.tolist()], *rest)

    def _all(self, heads: Heads, seed: torch.Tensor, far: npt.NDArray[np.float64]) -> Scan:
        asked, d = self._asked, self._divided
        found = scan(
            part_of(asked.q, heads), part_of(d.codes, heads), d.middle.first, d.middle.count, d.layout, self._reach,
            asked.scale, asked.softcap, seed, self._scratch, distances=far, verify=self._verify(heads),
            elsewhere=None if d.mirrored is None else d.mirrored.of(heads),
        )  # fmt: skip
        self.nbytes += heads.size * d.middle.run.size * d.layout.nbytes
        for head, tokens in zip(heads.tolist(), found.tokens, strict=True):
            self.parts[head] = (np.count_nonzero(np.diff(tokens // PART)) + min(1, tokens.size)) / self._every
        return found

    def _by_parts(self, heads: Heads, seed: torch.Tensor, far: npt.NDArray[np.float64]) -> Scan:
        asked, d = self._asked, self._divided
        assert d.summaries is not None
        found, looked = scan_parts(
            part_of(asked.q, heads), part_of(d.summaries, heads), lambda columns: self._codes(heads, columns),
            d.middle.first, d.middle.count, d.layout, self._reach, asked.scale, asked.softcap, seed, self._scratch,
            deviations=self._deviations, distances=far, verify=self._verify(heads),
        )  # fmt: skip
        self._held = None
        share = looked / max(1, int(d.middle.count.sum()))
        self.parts[heads] = share
        self.nbytes += int(heads.size * d.middle.run.size * (d.layout.nbytes * share))
        return found

    def _codes(self, heads: Heads, columns: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Where the codes of some blocks are, in memory until the scan is done. Raises NoCodes."""
        asked, d = self._asked, self._divided
        if not d.cold:
            return part_of(d.codes, heads)[:, columns]
        self._held = None
        found = self._partitions.bring(asked.state.ids(asked.row.first[d.middle.run[columns]]))
        if found is None:
            raise NoCodes
        addresses, self._held = found
        return part_of(addresses, heads)
