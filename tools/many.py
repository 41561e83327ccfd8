"""``alaya-tiers bench contexts``: a store of many small contexts: opened after a crash, looked up in, stored to.

All contexts begin alike and part inside their first segment, where hashes of whole segments do not help: the worst case
of a lookup. Before each opening a process that stores is killed.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError
from alaya_tiers.identity import Identity, Tokens, model_digest
from alaya_tiers.tools import machine
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.reporting import JsonFile, one_line_errors, show

Say = Callable[[str], None]

MODEL = {"synthetic": True}
SETTINGS = Settings(device_budget=64 << 20, host_budget=64 << 20, block_tokens=16, segment_tokens=64, io_threads=2)
WHO = Identity(
    model=model_digest(MODEL), weights="synthetic", dtype="float32", block_tokens=16, segment_tokens=64, lossy=False
)
ALIKE, TOKENS = 20, 60
"""Tokens that all contexts have in common, and that each has in all."""

AT_ONCE = 100
"""Contexts of one commit while the store is filled."""


@dataclass(slots=True)
class Row:
    """A store of so many contexts. Seconds; of lookups and commits, of each."""

    contexts: int
    manifest_bytes: int
    opening: list[float] = field(default_factory=list)
    first_lookup: list[float] = field(default_factory=list)
    lookups: list[float] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """All that was measured."""

    layers: int
    machine: dict[str, Any]
    cpu_of_others: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"benchmark": "contexts"} | asdict(self)


def opened(path: str) -> Contexts:
    """The contexts of a directory, to be written."""
    return Contexts(Engine(SETTINGS, path, MODEL))


def prompts(rng: np.random.Generator, count: int) -> Tokens:
    """Token ids [count, TOKENS] that begin alike."""
    return np.concatenate([np.full((count, ALIKE), 7), rng.integers(0, 30_000, (count, TOKENS - ALIKE))], 1)


def store(contexts: Contexts, tokens: Tokens, layers: int) -> None:
    """Store some contexts in one commit."""
    session = contexts.open([[]], 0, None, torch.device("cpu"))
    rows = torch.zeros(len(tokens), 1, tokens.shape[1], 16)
    for layer in range(layers):
        session.update(layer, rows, rows)
    contexts.store(session, tokens, WHO)
    session.clear()


def store_until_killed(path: str, layers: int) -> None:
    """What the process that is killed does."""
    contexts, rng = opened(path), np.random.default_rng()
    print("ready", flush=True)
    while True:
        store(contexts, prompts(rng, 1), layers)


def run(counts: tuple[int, ...], layers: int, rounds: int, directory: str | None, say: Say) -> Found:
    """Measure everything. Raises ConfigError, StoreError, OSError."""
    began, rng = CpuUse.now(), np.random.default_rng(0)
    found = Found(layers, machine.describe())
    parent = directory or os.environ.get("ALAYA_TIERS_DIR")
    with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent) as path:
        for count in counts:
            with closing(_Base(path)) as base:
                while (missing := count - len(base.contexts.manifest.contexts)) > 0:
                    say(f"{count:,} contexts: {missing:,} to be stored")
                    store(base.contexts, prompts(rng, min(missing, AT_ONCE)), layers)
            row = Row(count, 0)
            for number in range(rounds):
                say(f"{count:,} contexts: round {number + 1} of {rounds}")
                _round(path, row, layers, rng)
            found.rows.append(row)
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


class _Base:
    def __init__(self, path: str) -> None:
        self.contexts = opened(path)

    def close(self) -> None:
        self.contexts.engine.close()
        self.contexts.close()


def _round(path: str, row: Row, layers: int, rng: np.random.Generator) -> None:
    _kill_one(path, layers)
    began = time.perf_counter()
    base = _Base(path)
    row.opening.append(time.perf_counter() - began)
    contexts, root = base.contexts, WHO.root()
    with closing(base):
        lookups = [_timed(contexts.match, root, tokens) for tokens in prompts(rng, 200)]
        row.first_lookup.append(lookups[0])
        row.lookups += lookups[1:]
        row.commits += [_timed(store, contexts, prompts(rng, 1), layers) for _ in range(5)]
        newest = Path(path) / "generations" / str(contexts.manifest.generation) / "zarr.json"
        row.manifest_bytes = newest.stat().st_size


def _kill_one(path: str, layers: int) -> None:
    """Kill a process in the middle of storing."""
    code = f"from alaya_tiers.tools.many import store_until_killed; store_until_killed({path!r}, {layers})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        if child.stdout.readline() != b"ready\n":
            raise OSError("the process that is to be killed did not start")
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)


def _timed(work: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def table(found: Found) -> Table:
    """What was found, for people."""
    made = Table(title="a store of many contexts", title_justify="left")
    for name in (
        "contexts",
        "open after a kill, ms",
        "first lookup, ms",
        "lookup, ms",
        "commit of one, ms",
        "manifest",
    ):
        made.add_column(name, justify="right")
    for row in found.rows:
        times = (
            max(row.opening),
            max(row.first_lookup),
            statistics.median(row.lookups),
            statistics.median(row.commits),
        )
        made.add_row(f"{row.contexts:,}", *(f"{t * 1e3:.2f}" for t in times), format_bytes(row.manifest_bytes))
    m = found.machine
    made.caption_justify = "left"
    made.caption = (
        f"{found.layers} layers; {TOKENS} tokens each, the first {ALIKE} in common. Openings and first lookups: the "
        f"slowest; others: the median. {m['cpu']}, {m['cores']} cores; others took {found.cpu_of_others:.0%} of them."
    )
    return made


def command(
    counts: Annotated[str, typer.Option(help="How many contexts.")] = "100,1000,10000",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    rounds: Annotated[int, typer.Option(help="How often a store is killed, opened and asked.")] = 3,
    directory: Annotated[str | None, typer.Option("--dir", help="A directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
) -> None:
    """A store of many contexts: opening, looking up, storing. Example: alaya-tiers bench contexts --counts 100,1000"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        try:
            sizes = tuple(sorted(int(n) for n in counts.split(",")))
        except ValueError as error:
            raise ConfigError(f"--counts are numbers with commas between them, not {counts!r}") from error
        if min(*sizes, layers, rounds) < 1:
            raise ConfigError("--counts, --layers and --rounds must be positive")
        with errors.status("starting") as status:
            found = run(sizes, layers, rounds, directory, status.update)
    show([table(found)], found.as_dict(), json_file)
