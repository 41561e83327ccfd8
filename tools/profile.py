"""What a machine can do, measured once and kept in a file: what simulations and plans reckon with."""

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alaya_tiers.errors import ConfigError, OtherMachine
from alaya_tiers.index.plan import Rates
from alaya_tiers.tools import machine, toml

VERSION = 1
IDENTITY = ("cpu", "cores", "ram_gib")
"""What must be equal for a profile to speak of a machine."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Reading and writing the SSD in requests of ``size`` bytes, ``depth`` at a time.

    read, write: bytes a second of all together. latency: seconds of one read, median.
    """

    size: int
    depth: int
    read: float
    write: float
    latency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rates of one machine, all threads together; numbers, bytes or operations a second, or seconds.

    attend: bytes of K and V that the exact kernel attends, by dtype and head dimension ("float32/64"). scan: numbers of
    8-bit codes. pick: seconds of a key attended singly. encode: numbers of keys whose codes are made. weights: bytes of
    a model's weights that a decode step reads. flops: of prefill, really reached. step, layer: seconds of a decode step
    that depend on no size: once, and in each layer. look: what sparse attention adds in each layer. load: what a batch
    from the SSD takes beside the disk's time and attending it, others on their way.
    digest: bytes of blocks that one thread checks or names. page: seconds of a page of 4 KiB read singly from the SSD,
    many under way.
    """

    identity: dict[str, Any]
    versions: dict[str, Any]
    date: str
    memory_read: float
    memory_copy: float
    attend: dict[str, float]
    scan: float
    pick: float
    encode: float
    weights: float
    flops: float
    step: float
    layer: float
    look: float
    load: float
    digest: float
    ssd: tuple[Transfer, ...]
    page: float = 15e-6

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} of a profile is a number of at least 0, got {value!r}")
        if not self.ssd or not self.attend or not all(value > 0 for value in self.attend.values()):
            raise ConfigError("a profile has rates of the ssd and of attention, above 0")

    def attend_rate(self, dtype: str, dim: int) -> float:
        """Bytes of K and V a second: measured, or that of the nearest head dimension of the dtype, or of any."""
        known = {name: rate for name, rate in self.attend.items() if name.startswith(f"{dtype}/")} or self.attend
        return min(known.items(), key=lambda one: abs(int(one[0].partition("/")[2]) - dim))[1]

    def transfer(self, size: float, depth: int) -> Transfer:
        """The measured row that is nearest to such requests: in size, then the deepest that is not deeper."""
        near = min(abs(one.size.bit_length() - int(size).bit_length()) for one in self.ssd)
        rows = [one for one in self.ssd if abs(one.size.bit_length() - int(size).bit_length()) == near]
        return max(rows, key=lambda one: (one.depth <= depth, one.depth if one.depth <= depth else -one.depth))

    def rates_of(self, sizes: Sequence[int], *, deep: bool, write: bool = False) -> npt.NDArray[np.float64]:
        """Bytes a second of requests of these sizes, of all together, between the sizes that were measured. deep: many
        at once, rather than one."""
        depth = (max if deep else min)(one.depth for one in self.ssd)
        rows = sorted((one.size, one.write if write else one.read) for one in self.ssd if one.depth == depth)
        known, rates = zip(*rows, strict=True)
        return np.asarray(np.interp(np.log2(sizes), np.log2(known), rates))

    @property
    def ssd_read(self) -> float:
        """The most the SSD reads."""
        return max(one.read for one in self.ssd)

    @property
    def ssd_write(self) -> float:
        """The most the SSD writes."""
        return max(one.write for one in self.ssd)

    def rates(self, dtype: str = "float32", dim: int = 64) -> Rates:
        """What the optimizer of sparse mode is told of this machine."""
        return Rates(self.attend_rate(dtype, dim), self.scan, self.pick, self.ssd_read, self.page)

    def settings(self, dtype: str = "float32", dim: int = 64) -> dict[str, float]:
        """The same as settings of a cache."""
        rates = self.rates(dtype, dim)
        named = {"read_rate": rates.read, "scan_rate": rates.scan, "ssd_rate": rates.ssd, "pick_seconds": rates.pick}
        named |= {"page_seconds": rates.page, "look_seconds": max(1e-6, self.look)}
        return {name: float(f"{value:.3g}") for name, value in named.items()}

    def machine(self, layers: int) -> dict[str, float]:
        """Rates of a simulation's machine (``tools/hardware.py``), for a model of so many layers."""
        return {
            "ssd_read": self.ssd_read, "ssd_write": self.ssd_write, "pcie": self.memory_copy, "flops": self.flops,
            "device_read": self.weights, "step": self.step + layers * self.layer,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write it as TOML. Raises ConfigError."""
        rates = {name: float(f"{getattr(self, name):.4g}") for name in NUMBERS}
        tables: dict[str, Any] = {
            "profile": {"version": VERSION, "date": self.date},
            "identity": self.identity,
            "versions": self.versions,
            "rates": rates,
            "attend": {},
            "ssd": [
                {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(t).items()} for t in self.ssd
            ],
        }
        tables["attend"] = {name.replace("/", "_"): float(f"{rate:.4g}") for name, rate in self.attend.items()}
        note = (
            "What this machine can do, measured by alaya-tiers profile: bytes, numbers or operations a second, seconds."
        )
        try:
            path.write_text(toml.text(tables, note), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write a profile to {path}: {error}") from error


NUMBERS = tuple(f.name for f in fields(Profile) if f.type is float)


def identity() -> dict[str, Any]:
    """What this machine is, as far as rates depend on it."""
    facts = machine.describe()
    return {"cpu": facts["cpu"], "cores": facts["cores"], "ram_gib": round(facts["ram_bytes"] / 2**30)}


def load(path: Path, *, any_machine: bool = False) -> Profile:
    """The profile in a file.

    Raises ConfigError where it cannot be read, OtherMachine where it is another machine's and ``any_machine`` is not
    given.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read a profile from {path}: {error}") from error
    try:
        if (version := data["profile"]["version"]) != VERSION:
            raise ConfigError(
                f"{path} is a profile of version {version!r}, this program reads {VERSION}: measure again"
            )
        attend = {name.replace("_", "/"): float(rate) for name, rate in data["attend"].items()}
        found = Profile(
            identity=data["identity"],
            versions=data["versions"],
            date=data["profile"]["date"],
            attend=attend,
            ssd=tuple(Transfer(**row) for row in data["ssd"]),
            **{name: data["rates"][name] for name in NUMBERS if name != "page" or name in data["rates"]},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no profile, or not a whole one ({error}): make one by alaya-tiers profile"
        ) from error
    here = identity()
    differs = [
        f"{n} is {found.identity.get(n)!r} there, {here[n]!r} here"
        for n in IDENTITY
        if found.identity.get(n) != here[n]
    ]
    if differs and not any_machine:
        raise OtherMachine(
            f"{path} was measured on another machine ({'; '.join(differs)}): run alaya-tiers profile here, or say "
            "--any-machine to reckon with that machine's rates"
        )
    return found


def today() -> str:
    """The date a profile is from."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


TYPICAL = Profile(
    identity={"cpu": "typical", "cores": 0, "ram_gib": 0}, versions={}, date="", memory_read=30e9, memory_copy=12e9,
    attend={"float32/64": 27e9, "float32/128": 27e9, "bfloat16/64": 20e9, "bfloat16/128": 24e9}, scan=10e9, pick=50e-9,
    encode=170e6, weights=14e9, flops=100e9, step=1e-3, layer=0.8e-3, look=0.6e-3, load=0.4e-3, digest=8e9,
    ssd=(
        Transfer(16 << 10, 4, 0.5e9, 0.5e9, 100e-6), Transfer(64 << 10, 4, 1e9, 1e9, 200e-6),
        Transfer(256 << 10, 4, 1.5e9, 1.2e9, 400e-6), Transfer(1 << 20, 4, 1.5e9, 1.5e9, 2e-3),
    ),
)  # fmt: skip
"""Two cores of a server of 2023 with a fast disk: what is reckoned with where nothing was measured."""
