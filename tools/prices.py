"""What memory and servers cost: for searches a weight against time, for simulations money for a token."""

from dataclasses import dataclass

from alaya_tiers.errors import ConfigError

GIB = 1 << 30
NAMES = ("device", "host", "ssd", "server")


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a GiB of each tier, and of a server without its memory, for any time and in any unit."""

    device: float = 10.0
    host: float = 1.0
    ssd: float = 0.02
    server: float = 0.0

    def of(self, device: float, host: float, ssd: float, servers: int = 0) -> float:
        """Of so many bytes, and servers."""
        return (device * self.device + host * self.host + ssd * self.ssd) / GIB + servers * self.server


def prices(text: str | None, usual: Prices | None = None) -> Prices:
    """``"device=10,host=1,ssd=0.02"``: of a GiB; ``server=`` of a server. Raises ConfigError."""
    found = {}
    for one in (text or "").split(",") if text else ():
        name, _, value = one.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise ConfigError(f"cannot read the price {one!r}; write e.g. host=1,ssd=0.02") from error
    if unknown := sorted(set(found) - set(NAMES)):
        raise ConfigError(f"nothing called {unknown[0]!r} has a price: {', '.join(NAMES)}")
    if any(not 0 <= value < float("inf") for value in found.values()):
        raise ConfigError("a price is at least 0")
    usual = usual or Prices()
    return Prices(**{name: found.get(name, getattr(usual, name)) for name in NAMES})


RENTED = Prices(device=0.02, host=0.003, ssd=0.0001, server=1.0)
"""Dollars an hour, of a GiB and of a server: about what clouds take for rented machines in 2026. Give your own."""
