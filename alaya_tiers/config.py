"""Frozen settings, checked once."""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

from alaya_tiers.depth import DEPTHS
from alaya_tiers.errors import ConfigError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}

RATES = (
    "bus_rate", "device_rate", "read_rate", "scan_rate", "ssd_rate", "look_seconds", "pick_seconds", "page_seconds",
)  # fmt: skip

SIZES = (
    "device_budget", "host_budget", "ssd_budget", "write_budget", "batch_bytes", "index_budget", "device_index_budget",
    "attention_budget",
)  # fmt: skip

KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a name"}
"""Types of settings, in words."""

ALPHA, LEAST_MASS = 0.001, 0.82
"""Of sparse mode by default: docs/benchmarks.md says what they leave out."""

IoMode = Literal["auto", "direct", "buffered"]
Mode = Literal["exact", "sparse"]
OnCorrupt = Literal["raise", "recompute", "drop"]


def parse_bytes(size: int | str) -> int:
    """Bytes of ``8589934592``, ``"8GiB"``, ``"500 MB"`` or ``"1.5gib"``.

    Raises ConfigError for anything else, and for negative sizes.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"a size is a number of bytes or a string such as '8GiB', not {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise ConfigError(f"a size cannot be negative: {size}")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"cannot read {size!r} as a size; write bytes or e.g. '512MiB', '8GiB', '1.5GB'")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(n: float) -> str:
    """``n`` bytes for people: ``format_bytes(1536) == '1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one cache. Every field has a default that works; sizes are bytes or strings.

    device_budget: bytes of KV in the device tier (GPU memory with CUDA, an arena of plain memory without).
    host_budget: bytes of KV in the host tier (pinned when CUDA is there).
    ssd_budget: bytes of KV on disk; None = as much as the disk has.
    write_budget: bytes a day that may be written to the store's disk, which wears; None = any number. What is over it
        stays in memory while it fits, then is a WriteBudgetSpent. Kept with the store; UTC days.
    mode: "exact" (tokens identical to DynamicCache) or "sparse" (decoding attends to the keys that matter and
        estimates the rest; prefill is exact).
    alpha: sparse mode attends to every key with at least this share of the largest weight (DIPR). The paper's 0.012 is
        faster, and its output error several times as large: docs/benchmarks.md.
    recent_tokens: last tokens of the context that sparse mode always attends to, beside sink_tokens first ones.
    least_mass: share of the attention that every query head is to attend to and not to estimate: heads in which what
        ``alpha`` asks for holds less look for more keys, or read all; 0 = alpha alone. None = 0.82, and 0 where alpha
        is larger than its default: who asks for less wants speed, and from SSD what such heads read besides is dear.
        Not with most_selected, attention_budget or attention_target, which bound the keys of a step: the statistics
        tell what they leave out.
    most_selected: at most so many keys for each kv head beyond these, the nearest; None = as many as are near enough.
        Top-k alone is this with an alpha that every key reaches, 1e-300.
    attention_budget: at most so many bytes of keys and values beyond these for each new token, of all layers, in memory
        and from disk; what has no codes yet comes on top. None = as many as are near enough.
    index_bits: bits of each number of a coded key, 4 or 8. 8 find fewer keys that do not matter, in twice the memory.
    index_sure: standard deviations of a code's error that are allowed for; 0 = any error there can be (complete).
    index_parts: standard deviations that a key may lie off what its 64 neighbours have in common before they are left
        out unseen; 0 = they are left out only where none can be wanted. 4 or 5 makes long contexts much faster whose
        neighbours resemble each other, and overlooks a single key that is like none of its own: no needle is found so.
    index_budget: bytes of codes in memory; None = no limit. Codes of a stored context that find no room stay on disk
        and are read when they are wanted; others are attended exactly, with a warning.
    device_index_budget: with a GPU, bytes of codes that also lie in its memory, where it scans them; what finds no room
        there the CPU scans. Taken as codes come.
    measure_mass: sparse mode also attends exactly and compares, for its statistics. Slow.
    sparse_prefill: sparse mode also for prompts, a few tokens at a time; else prompts are attended exactly.
    attention_target: seconds of attention for each new token that sparse mode aims at: what heads may select is cut to
        what fits, and the statistics tell what that left out. None = as long as the keys within reach take.
    bus_rate, device_rate: with a GPU, bytes a second from host memory to it, and of KV that it attends. With read_rate
        they decide how many blocks of the host tier are brought to the GPU for a step and how many the CPU attends.
    read_rate, scan_rate, ssd_rate, look_seconds, pick_seconds, page_seconds: what the optimizer of sparse mode believes
        of this machine: bytes a second of KV in memory, numbers of codes, bytes of the disk, and seconds for a layer in
        which heads look for keys, beside codes and keys, for a key picked singly, all threads together, and for a page
        of 4 KiB read singly from the disk, many under way. ``alaya-tiers profile`` measures them.
    block_tokens: tokens of one block, a power of two.
    segment_tokens: tokens of one segment (one file per layer), a power of two, at least block_tokens.
    sink_tokens: first tokens of the context that the device tier prefers to keep.
    dirty_limit: share of the host tier that may wait to be written; above it write-behind starts.
    prefetch_share: share of the host tier that reads ahead may fill.
    batch_bytes: bytes of one streamed batch: what attention waits for at a time.
    io: "direct" (O_DIRECT: the page cache is not used, the budgets are all the memory there is), "buffered",
        or "auto" (direct where the file system can).
    io_threads: reads and writes in flight at once.
    queue_depth: single pages that each of these threads reads at once, 1 to 256; None = adapted to what the disk gives.
    on_corrupt: what a database does when a prompt's stored prefix is known to be damaged: "raise" StoreCorrupt;
        "recompute" what is damaged and all after it: a shorter prefix is reused, with a warning, and storing the
        session mends the context; "drop" it, with a warning: contexts that need it end before it from then on.
    check_on_open: whether a database reads all of a stored prefix before it reuses it for the first time. Else damage
        is met when attention asks for the block: an error, after which the next session does what ``on_corrupt`` says.
    eviction: policy of the host tier, a name in ``alaya_tiers.policies.EVICTION``. "auto" is "scan" in exact mode
        and "lru" in sparse mode; there it also orders the single pages of cold blocks.
    page_share: share of the host tier that such pages may take.
    guess: policy of reading such pages ahead, a name in ``alaya_tiers.policies.GUESS``. On two cores none has paid so
        far: docs/benchmarks.md.
    prefetch: policy of reading ahead, a name in ``alaya_tiers.policies.PREFETCH``.
    """

    device_budget: int = 256 << 20
    host_budget: int = 2 << 30
    ssd_budget: int | None = None
    write_budget: int | None = None
    mode: Mode = "exact"
    alpha: float = ALPHA
    recent_tokens: int = 512
    least_mass: float | None = None
    most_selected: int | None = None
    attention_budget: int | None = None
    index_bits: int = 4
    index_sure: float = 2.0
    index_parts: float = 0.0
    index_budget: int | None = 2 << 30
    device_index_budget: int = 2 << 30
    measure_mass: bool = False
    sparse_prefill: bool = False
    attention_target: float | None = None
    bus_rate: float = 20e9
    device_rate: float = 1e12
    read_rate: float = 30e9
    scan_rate: float = 16e9
    ssd_rate: float = 1.5e9
    look_seconds: float = 1e-3
    pick_seconds: float = 100e-9
    page_seconds: float = 15e-6
    block_tokens: int = 256
    segment_tokens: int = 8192
    sink_tokens: int = 256
    dirty_limit: float = 0.5
    prefetch_share: float = 0.25
    batch_bytes: int = 8 << 20
    io: IoMode = "auto"
    io_threads: int = 4
    queue_depth: int | None = None
    on_corrupt: OnCorrupt = "recompute"
    check_on_open: bool = False
    eviction: str = "auto"
    page_share: float = 0.75
    guess: str = "none"
    prefetch: str = "next"

    def __post_init__(self) -> None:
        for name in SIZES:
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_bytes(size))
        for name, kinds in _KINDS.items():
            _check_kind(name, getattr(self, name), kinds)
        for name in ("block_tokens", "segment_tokens"):
            n = getattr(self, name)
            if not isinstance(n, int) or n < 1 or n & (n - 1):
                raise ConfigError(f"{name} must be a power of two, got {n!r}")
        if self.segment_tokens < self.block_tokens:
            raise ConfigError(f"segment_tokens ({self.segment_tokens}) is below block_tokens ({self.block_tokens})")
        for name in ("dirty_limit", "prefetch_share", "page_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)!r}")
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is a share of the largest weight, above 0 and at most 1, got {self.alpha!r}")
        if self.least_mass is not None and not 0 <= self.least_mass < 1:
            raise ConfigError(f"least_mass is a share of the attention, 0 to below 1, got {self.least_mass!r}")
        if self.index_bits not in (4, 8):
            raise ConfigError(f"index_bits is 4 or 8, got {self.index_bits!r}")
        for name in ("index_sure", "index_parts"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is a number of standard deviations, or 0, got {getattr(self, name)!r}")
        if self.most_selected is not None and self.most_selected < 0:
            raise ConfigError(f"most_selected cannot be negative, got {self.most_selected!r}")
        for name in (*RATES, "attention_target"):
            if (number := getattr(self, name)) is not None and not 0 < number < float("inf"):
                raise ConfigError(f"{name} must be above 0, got {number!r}")
        for name, least in (("sink_tokens", 0), ("recent_tokens", 1), ("io_threads", 1), ("batch_bytes", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(f"{name} is an integer of at least {least}, got {getattr(self, name)!r}")
        if self.queue_depth is not None and not 1 <= self.queue_depth <= DEPTHS[-1]:
            raise ConfigError(f"queue_depth is 1 to {DEPTHS[-1]}, or None to adapt it, got {self.queue_depth!r}")
        _check_choice("io", self.io, get_args(IoMode))
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("on_corrupt", self.on_corrupt, get_args(OnCorrupt))

    @property
    def mass_floor(self) -> float:
        """What ``least_mass`` comes to."""
        if self.least_mass is None:
            return LEAST_MASS if self.alpha <= ALPHA else 0.0
        return self.least_mass

    @property
    def eviction_of_blocks(self) -> str:
        """The policy of whole blocks in the host tier."""
        return ("lru" if self.mode == "sparse" else "scan") if self.eviction == "auto" else self.eviction

    @property
    def eviction_of_pages(self) -> str:
        """The policy of single pages."""
        return "lru" if self.eviction == "auto" else self.eviction

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Settings from a mapping; an unknown name is a ConfigError that lists the known ones."""
        known = get_type_hints(cls)
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Settings from the ``[alaya_tiers]`` table of a TOML file (or the whole file without such a table)."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read settings from {path}: {error}") from error
        return cls.from_dict(data.get("alaya_tiers", data))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self).from_dict(dataclasses.asdict(self) | changes)


def _check_kind(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """Raises ConfigError for a value of none of these types. A whole number is one too."""
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, Real))
    if not fits:
        wanted = " or ".join(KINDS.get(kind, "None") for kind in kinds)
        raise ConfigError(f"{name} is {wanted}, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not available; choose one of {', '.join(map(repr, choices))}")


_HINTS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Settings).items()}
_KINDS = {name: kinds for name, kinds in _HINTS.items() if all(isinstance(kind, type) for kind in kinds)}
"""The types that each setting may have, but for names that are one of a few."""
