"""The host tier: RAM, pinned when there is CUDA so that copies to the GPU run at the speed of the bus."""

import torch

from alaya_tiers.tiers.arena import Arena, pinned_slab, plain_slab
from alaya_tiers.tiers.base import Accountant


class HostTier(Arena):
    """Slots in host memory; ``budget`` bytes at most."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, *, pinned: bool | None = None) -> None:
        pinned = torch.cuda.is_available() if pinned is None else pinned
        super().__init__("host", budget, slot_bytes, accountant, pinned_slab if pinned else plain_slab)
