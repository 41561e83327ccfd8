"""The device tier: GPU memory with CUDA, a separately budgeted arena of plain memory without."""

from functools import partial

import torch

from alaya_tiers.tiers.arena import Arena, cuda_slab, plain_slab
from alaya_tiers.tiers.base import Accountant


class DeviceTier(Arena):
    """Slots on ``device``; ``budget`` bytes at most."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, device: torch.device) -> None:
        make = partial(cuda_slab, device=device) if device.type == "cuda" else plain_slab
        super().__init__("device", budget, slot_bytes, accountant, make)
