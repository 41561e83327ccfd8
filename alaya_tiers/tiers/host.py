"""The host tier: RAM, registered with the device so that copies to it run at the speed of the bus."""

from alaya_tiers.devices.base import Device
from alaya_tiers.devices.cpu import CPU
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant


class HostTier(Arena):
    """Slots in host memory; ``budget`` bytes at most."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, device: Device = CPU) -> None:
        super().__init__("host", budget, slot_bytes, accountant, device.host_slab)
