"""The device tier: GPU memory with CUDA, a separately budgeted arena of plain memory without."""

from functools import partial

import torch

from alaya_tiers.tiers.arena import Arena, plain_slab
from alaya_tiers.tiers.base import Accountant


class DeviceTier(Arena):
    """Slots on ``device``; ``budget`` bytes at most."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, device: torch.device) -> None:
        self.on_cpu = device.type == "cpu"
        make = plain_slab if self.on_cpu else partial(torch.empty, dtype=torch.uint8, device=device)
        super().__init__("device", budget, slot_bytes, accountant, make)
