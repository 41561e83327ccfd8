"""Blocks in the memory of a device that the CPU cannot read: attended there, or copied from there."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial, attend_blocks
from alaya_tiers.blocks import Geometry
from alaya_tiers.engine import Engine
from alaya_tiers.ledger import Ids, Slots


@dataclass(frozen=True, slots=True)
class Near:
    """Pinned blocks of the device tier. slots: int32 [kv_heads, n], the slots that ``blocks`` lie in."""

    engine: Engine
    slots: Slots
    blocks: BlockList

    def attend(
        self,
        q: Tensor,
        scale: float,
        lo: npt.NDArray[np.int32],
        hi: npt.NDArray[np.int32],
        softcap: float | None,
        top: Tensor | None = None,
        *,
        latent: bool = False,
    ) -> Partial:
        """attention.attend_blocks; top: float32 [kv_heads, rows], where q is."""
        mover = self.engine.mover
        blocks = replace(self.blocks, latent=latent)
        with mover.lock:
            return mover.lanes.attend(q, self.slots, blocks, scale, lo, hi, softcap, top)

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """attention.gather of some of these blocks, to where the device is."""
        mover = self.engine.mover
        with mover.lock:
            return mover.lanes.gather(self.slots, blocks, lo, hi)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Single tokens in pinned blocks of the device tier. slots: those blocks lie in; addresses, first: as for
    attention.attend_lists.
    """

    slots: Slots
    addresses: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]

    def attend(self, engine: Engine, q: Tensor, g: Geometry, scale: float, softcap: float | None) -> Partial:
        """attention.attend_lists, on the device: the result too. q: anywhere."""
        lanes, dims = engine.mover.lanes, (g.k_dim, g.v_dim)
        with engine.mover.lock:
            above = q.to(lanes.device.place)
            return lanes.attend_lists(above, self.slots, self.addresses, self.first, dims, g.dtype, scale, softcap)


def on_cpu(*parts: Tensor) -> list[Tensor]:
    """Results of the device, of one dtype, in memory of the CPU: one copy, so one wait for all."""
    whole = torch.cat([part.reshape(-1) for part in parts]).cpu()
    pieces = torch.split(whole, [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def attend_anywhere(
    q: Tensor,
    blocks: BlockList | Near,
    scale: float,
    lo: npt.NDArray[np.int32],
    hi: npt.NDArray[np.int32],
    softcap: float | None,
    top: Tensor,
    *,
    latent: bool,
) -> Partial:
    """attention.attend_blocks with q, top and the result on the CPU, wherever the blocks are."""
    if isinstance(blocks, BlockList):
        return attend_blocks(q, replace(blocks, latent=latent), scale, lo, hi, softcap, top)
    place = blocks.engine.mover.lanes.device.place
    best = torch.empty(top.shape, device=place)
    found = blocks.attend(q.to(place), scale, lo, hi, softcap, best, latent=latent)
    out, lse, highest = on_cpu(*found, best)
    top.copy_(highest)
    return Partial(out, lse)


def copied_rows(engine: Engine, blocks: Ids, where: npt.NDArray[np.int64], g: Geometry) -> Tensor:
    """Rows at addresses of the device, in pinned ``blocks``, copied to memory of the CPU: [n, k_dim + v_dim]."""
    mover, n = engine.mover, where.size
    ones = BlockList(where[None], np.arange(n, dtype=np.int32), np.ones(n, np.int32), g.k_dim, g.v_dim, g.dtype)
    with mover.lock:
        k, v = mover.lanes.gather(mover.ledger.device[blocks], ones, 0, n)
    return torch.cat([k[0], v[0]], 1).cpu()


def rows_of(engine: Engine, block: int, shape: tuple[int, int, torch.dtype], first: int, n: int) -> Tensor:
    """Rows of one pinned block, wherever it is, copied to the device: [n, k_dim + v_dim].

    shape: k_dim, v_dim, dtype.
    """
    mover, (k_dim, v_dim, dtype) = engine.mover, shape
    slot, start = int(mover.ledger.device[block]), first * (k_dim + v_dim) * dtype.itemsize
    if slot < 0:
        end = start + n * (k_dim + v_dim) * dtype.itemsize
        return mover.tensor(block)[start:end].view(dtype).view(n, -1).to(mover.lanes.device.place)
    slots = np.array([[slot]], np.int32)
    at, count = mover.device.addresses(slots) + start, np.array([n], np.int32)
    blocks = BlockList(at, np.zeros(1, np.int32), count, k_dim, v_dim, dtype)
    k, v = Near(engine, slots, blocks).gather(blocks, 0, n)
    return torch.cat([k[0], v[0]], 1)
