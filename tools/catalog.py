"""Machines nobody here has: what the makers say, less what is lost on the way. For planning past one's own."""

from dataclasses import replace
from typing import Any

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools.profile import TYPICAL, Profile, Transfer

GIB = 1 << 30

MACHINES: dict[str, dict[str, Any]] = {
    "a100-80": {"device_memory": 48 * GIB, "pcie": 20e9, "flops": 150e12},
    "h100-80": {"device_memory": 48 * GIB, "pcie": 45e9, "flops": 400e12},
    "h200-141": {"device_memory": 110 * GIB, "pcie": 45e9, "flops": 400e12},
    "more-hbm": {"device_memory": 256 * GIB, "pcie": 100e9, "flops": 800e12},
    "gen3-ssd": {"ssd_read": 3e9, "ssd_write": 1.5e9},
    "gen5-ssd": {"ssd_read": 12e9, "ssd_write": 8e9},
    "four-gen5-ssds": {"ssd": 16 << 40, "ssd_read": 45e9, "ssd_write": 30e9},
    "object-store": {"ssd": 64 << 40, "ssd_read": 1.2e9, "ssd_write": 1e9},
}
"""For ``alaya-tiers simulate --machine``: parts of a machine, several after one another with +. Rates in bytes and
operations a second, about 80 % of what data sheets say; device memory is what weights and activations of an 8B model
leave. An object store takes the place of the SSD: here by bandwidth only, its latency is in ``PROFILES``."""

MB = 1 << 20
PROFILES: dict[str, Profile] = {
    "gen5-ssd": replace(
        TYPICAL,
        ssd=(
            Transfer(16 << 10, 4, 1.2e9, 1e9, 50e-6),
            Transfer(64 << 10, 4, 4e9, 3e9, 60e-6),
            Transfer(256 << 10, 4, 9e9, 6e9, 110e-6),
            Transfer(MB, 4, 12e9, 8e9, 330e-6),
        ),
    ),
    "object-store": replace(
        TYPICAL,
        ssd=(
            Transfer(64 << 10, 4, 8e6, 4e6, 30e-3),
            Transfer(256 << 10, 4, 32e6, 16e6, 32e-3),
            Transfer(MB, 4, 110e6, 60e6, 36e-3),
            Transfer(8 * MB, 4, 500e6, 300e6, 64e-3),
        ),
    ),
}
"""For recorded runs and plans (``--what-if``): a typical processor with another disk. Requests of an object store take
30 ms before their first byte, so blocks should be large."""


def machine(names: str) -> dict[str, Any]:
    """The parts ``names`` names, later ones counting more. Raises ConfigError."""
    found: dict[str, Any] = {}
    for name in names.split("+"):
        if name.strip() not in MACHINES:
            raise ConfigError(
                f"no machine {name.strip()!r} is described; known are {', '.join(MACHINES)}, or a TOML file"
            )
        found |= MACHINES[name.strip()]
    return found


def what_if(name: str) -> Profile:
    """A profile of a machine that is not here. Raises ConfigError."""
    if name not in PROFILES:
        raise ConfigError(f"no profile {name!r} is described; known are {', '.join(PROFILES)}")
    return PROFILES[name]
