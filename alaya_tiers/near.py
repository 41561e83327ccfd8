"""Blocks in the memory of a device that the CPU cannot read: attended there."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial
from alaya_tiers.engine import Engine
from alaya_tiers.ledger import Slots


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
    ) -> Partial:
        """attention.attend_blocks; top: float32 [kv_heads, rows], where q is."""
        mover = self.engine.mover
        with mover.lock:
            return mover.lanes.attend(q, self.slots, self.blocks, scale, lo, hi, softcap, top)

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """attention.gather of some of these blocks, to where the device is."""
        mover = self.engine.mover
        with mover.lock:
            return mover.lanes.gather(self.slots, blocks, lo, hi)


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
