"""The device tier: GPU memory with CUDA, a separately budgeted arena of plain memory without."""

from alaya_tiers.devices.base import Device
from alaya_tiers.devices.cpu import CPU
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant


class DeviceTier(Arena):
    """Slots on ``device``; ``budget`` bytes at most."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, device: Device = CPU) -> None:
        super().__init__("device", budget, slot_bytes, accountant, device.slab, on_cpu=device.on_cpu)
