"""Machines, rates and shares in words: what options and TOML files say, as values. Raises ConfigError throughout."""

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from alaya_tiers.config import parse_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import Share, Shares
from alaya_tiers.tools import catalog
from alaya_tiers.tools.hardware import Machine

SIZES = ("device_memory", "host_memory", "ssd")
BYTE_RATES = ("ssd_read", "ssd_write", "pcie", "device_read")
OTHERS = "others"
"""In a file of shares: of every category that is not named."""


def rate(name: str, text: str | float) -> float:
    """``"3GB/s"`` in bytes a second, ``"150TFLOPS"`` in operations a second, or a plain number. Raises ConfigError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    if not isinstance(text, str):
        raise ConfigError(f"{name} is a number or a string such as '3GB/s', not {text!r}")
    if name in BYTE_RATES:
        return float(parse_bytes(text.strip().removesuffix("/s")))
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e-?\d+)?)\s*([KMGTP]?)(FLOPS|FLOP/s)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"cannot read {text!r} as {name}; write e.g. '150TFLOPS'")
    return float(match[1]) * 1000.0 ** " KMGTP".index(match[2].upper() or " ")


def machine_of(values: dict[str, Any]) -> Machine:
    """A machine of sizes and rates in words. Raises ConfigError."""
    known = [f.name for f in fields(Machine)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"unknown settings {', '.join(unknown)} of a machine; known are {', '.join(known)}")
    readable: dict[str, Any] = {}
    for name, value in values.items():
        if name == "servers":
            if isinstance(value, str) and not value.strip().isdigit():
                raise ConfigError(f"servers is a number, got {value!r}")
            readable[name] = int(value) if isinstance(value, str) else value
        else:
            readable[name] = parse_bytes(value) if name in SIZES else rate(name, value)
    return Machine(**readable)


def described(path: Path | None) -> dict[str, Any]:
    """The settings of a machine's TOML file, or of parts that ``tools/catalog.py`` names. Raises ConfigError."""
    if path is None:
        return {}
    if not path.suffix and not path.exists():
        return catalog.machine(str(path))
    data = _toml(path, "a machine")
    settings = data.get("machine", data)
    if not isinstance(settings, dict):
        raise ConfigError(f"cannot read a machine from {path}: [machine] must be a table")
    return {name.replace("-", "_"): value for name, value in settings.items()}


def _toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} from {path}: {error}") from error


def swept(machine: Machine, sweep: str | None) -> list[Machine]:
    """The machine, or one for each value of ``name=value,value``. Raises ConfigError."""
    if sweep is None:
        return [machine]
    name, equals, values = sweep.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or name not in {f.name for f in fields(Machine)} or not all(v.strip() for v in values.split(",")):
        raise ConfigError(f"cannot read the sweep {sweep!r}; write e.g. host-memory=16GiB,64GiB")
    return [replace(machine, **{name: getattr(machine_of({name: v.strip()}), name)}) for v in values.split(",")]


def shares_of(path: Path | None) -> Shares | None:
    """Of a file with a table for each category: floor and most (sizes), ttl (seconds). Raises ConfigError."""
    if path is None:
        return None
    named: dict[str, Share] = {}
    for name, values in _toml(path, "shares").items():
        if not isinstance(values, dict) or (unknown := sorted(set(values) - {"floor", "most", "ttl"})):
            wrong = f"unknown {unknown[0]!r}" if isinstance(values, dict) else f"{values!r} is no table"
            raise ConfigError(f"{path}: {name}: {wrong}; a share has floor, most and ttl")
        sizes = {one: parse_bytes(values[one]) for one in ("floor", "most") if one in values}
        ttl = values.get("ttl")
        if isinstance(ttl, bool) or not isinstance(ttl, int | float | None):
            raise ConfigError(f"{path}: {name}: ttl is a number of seconds, got {ttl!r}")
        named[name] = Share(sizes.get("floor", 0), sizes.get("most"), ttl)
    if not named:
        raise ConfigError(f"{path} names no category")
    return Shares({name: share for name, share in named.items() if name != OTHERS}, named.get(OTHERS, Share()))
