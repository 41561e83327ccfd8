"""What holds the first tier and computes there: base (the seam), cpu, cuda, simulated; order: who waits for whom."""

import torch

from alaya_tiers.devices.base import Device
from alaya_tiers.devices.cpu import CPU


def device_at(place: torch.device) -> Device:
    """The device of a model that runs at ``place``. Nothing of CUDA is imported for one that runs on the CPU."""
    if place.type == "cpu":
        return CPU
    from alaya_tiers.devices.cuda import Cuda

    return Cuda(place)
