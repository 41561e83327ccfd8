"""``alaya-tiers bench larger``: decoding a stored context that is larger than the machine's memory.

The context is imported in chunks by a process of its own, so that what made the keys is not counted, and kept in
--path: the next run finds it. Then a database is opened on it with a small host budget: the time of opening, of the
first step and of those after, bytes a step, the most memory the process ever had. Attention of a few layers without a
model; queries drift as in ``bench offload``. O_DIRECT where the file system can; codes are not in
the page cache when it begins.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import Settings, format_bytes, parse_bytes
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import AlayaError, ConfigError
from alaya_tiers.identity import Identity, Tokens, model_digest
from alaya_tiers.parts import Chunk
from alaya_tiers.tools import machine, offload, rawdisk
from alaya_tiers.tools.baselines import DTYPES, parse_contexts
from alaya_tiers.tools.heads import RETRIEVAL, Heads
from alaya_tiers.tools.heads import Plan as HeadsPlan
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.offload import Say, Way
from alaya_tiers.tools.reporting import JsonFile, one_line_errors, show

CHUNK = 8192
"""Tokens imported at a time, all layers."""

KEEP_EVERY = 256 << 10
"""Tokens after which an import that is interrupted goes on."""


MODEL = {"synthetic": True}
WHO = Identity(
    model=model_digest(MODEL), weights="synthetic", dtype="float32", block_tokens=256, segment_tokens=8192, lossy=False
)


@dataclass(slots=True)
class Found:
    """All that was measured. Seconds: of importing, opening the store, making a session. Bytes of memory.

    imported, import_rss: None where the context was there; the most memory that the process that imports had.
    """

    plan: offload.Plan
    machine: dict[str, Any]
    disk: Bandwidth
    page_rate: float
    host_budget: int
    imported: float | None
    import_rss: int | None
    opening: float
    session: float
    way: Way
    budgets: int
    index_bytes: int
    rss_before: int
    cpu_of_others: float = 0.0

    @property
    def read_all(self) -> float:
        """Seconds to read all KV from the disk once, at its best."""
        return self.plan.kv_bytes / self.disk.best

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = asdict(self) | {"benchmark": "larger", "read_all_seconds": self.read_all, "disk": self.disk.as_dict()}
        facts["plan"]["path"] = None
        return facts


def run(plan: offload.Plan, host: int, index: int | None, say: Say) -> Found:
    """Measure everything; ``plan.path`` keeps the context. index: memory for codes. Raises AlayaError, OSError."""
    began, path, imported, import_rss = CpuUse.now(), plan.path, None, None
    assert path is not None
    path.mkdir(parents=True, exist_ok=True)
    say("the disk itself")
    with rawdisk.disk_file(path.parent, min(1 << 30, max(64 << 20, plan.kv_bytes))) as file:
        disk, pages = rawdisk.disk_bandwidth(file, min(512 << 20, file.nbytes)), rawdisk.page_rate(file)
    if not _is_there(plan, host):
        say("importing, in a process of its own")
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(asdict(plan), default=str), str(host)], check=False
        )
        if done.returncode:
            raise ConfigError(f"the import failed with exit status {done.returncode}: run this again to go on with it")
        imported = time.perf_counter() - started
        import_rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    rawdisk.empty_cache(path.rglob("*"))
    rss, opened = psutil.Process().memory_info().rss, time.perf_counter()
    with _database(plan, host, index) as (engine, contexts):
        opening, opened = time.perf_counter() - opened, time.perf_counter()
        names, known = contexts.match(WHO.root(""), _ids(plan))
        session = contexts.open([names], known, None, torch.device("cpu"))
        made = time.perf_counter() - opened
        way = offload.steps(plan, Heads(plan.heads), session, "decoding", say)
        found = Found(
            plan, machine.describe(), disk, pages, host, imported, import_rss, opening, made, way,
            engine.settings.device_budget + host, engine.used_bytes("index"), rss,
        )  # fmt: skip
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


def bring(described: str, host: int) -> None:
    """Import the context of a plan (JSON), or what is missing of it. Exits with status 1 where that fails."""
    machine.give_memory_back()
    given, console = json.loads(described), Console(stderr=True)
    given |= {"heads": HeadsPlan(**given["heads"]), "path": Path(given["path"])}
    plan = offload.Plan(**given)
    try:
        with console.status("importing") as status, _database(plan, host) as (_, contexts):
            contexts.load(
                _ids(plan),
                _chunks(plan),
                WHO,
                say=lambda done, of: status.update(f"importing: {done:,} of {of:,} tokens"),
                keep_every=KEEP_EVERY,
            )
    except (AlayaError, OSError) as error:
        console.print(f"error: {error}", highlight=False)
        raise SystemExit(1) from error


@contextmanager
def _database(plan: offload.Plan, host: int, index: int | None = None) -> Iterator[tuple[Engine, Contexts]]:
    """A store of no model's but this benchmark's contexts, open for writing. index: bytes of codes in memory."""
    settings = Settings(
        mode="sparse", alpha=plan.heads.alpha, index_bits=plan.heads.bits, index_sure=plan.heads.sure,
        most_selected=plan.heads.most, index_budget=index, device_budget=128 << 20, host_budget=host,
        index_parts=plan.heads.parts, guess=plan.ways[0][1], eviction=plan.ways[0][0],
    )  # fmt: skip
    engine = Engine(settings, str(plan.path), MODEL)
    try:
        contexts = Contexts(engine)
        try:
            yield engine, contexts
        finally:
            engine.close()
            contexts.close()
    finally:
        engine.close()


def _is_there(plan: offload.Plan, host: int) -> bool:
    with _database(plan, host) as (_, contexts):
        return contexts.match(WHO.root(""), _ids(plan))[1] == plan.tokens


def _ids(plan: offload.Plan) -> Tokens:
    """Token ids that say what keys and values there are, so that those of other plans are not taken for them."""
    p = plan.heads
    first = [p.kv_heads, p.head_dim, p.layers, DTYPES[p.dtype].itemsize, int(p.passages)]
    return np.concatenate([first, np.arange(plan.tokens - len(first))]).astype(np.int64)


def _chunks(plan: offload.Plan) -> Iterator[Chunk]:
    heads = Heads(plan.heads)
    for start in range(0, plan.tokens, CHUNK):
        n = min(CHUNK, plan.tokens - start)
        yield [heads.chunk(layer, start, n) for layer in range(plan.heads.layers)]


def table(found: Found) -> Table:
    """What was found, for people."""
    p, way, m, page = found.plan, found.way, found.machine, found.way.pages
    made = Table(
        title=f"{p.tokens:,} tokens, {format_bytes(p.kv_bytes)} of KV in {p.heads.layers} layers, host budget "
        f"{format_bytes(found.host_budget)}; {p.kind} heads, drift {p.drift}",
        title_justify="left",
    )
    for name in ("", "seconds", "MiB read", "x reading all KV"):
        made.add_column(name, justify="right")
    if found.imported is not None:
        made.add_row("import and index", f"{found.imported:.0f}", "", "")
    made.add_row("open the store", f"{found.opening:.3f}", "", "")
    made.add_row("make a session", f"{found.session:.3f}", "", "")
    for name, seconds, nbytes in (
        ("first step", way.first, way.first_bytes),
        (f"step, median of {p.steps}", way.median, way.read_bytes),
        ("reading all KV once", found.read_all, p.kv_bytes),
    ):
        made.add_row(name, f"{seconds:.3f}", f"{nbytes / 2**20:,.1f}", f"{found.read_all / seconds:.1f}")
    size, disk = format_bytes, f"{found.disk.best / 1e6:.0f} MB/s in sequence, {found.page_rate:,.0f} pages"
    made.caption_justify = "left"
    made.caption = (
        f"attended {way.selected:.2%} of the tokens, mass {way.mass:.3f}; pages: hits {page['hit_rate']:.3f}, "
        f"amplified {page['read_amplification']:.1f}. Most RSS {size(way.rss)}, {size(found.rss_before)} of it before"
        f"{'' if found.import_rss is None else f', {size(found.import_rss)} while importing'}; "
        f"budgets {size(found.budgets)} + index {size(found.index_bytes)}; the machine has {size(m['ram_bytes'])}. "
        f"Disk {disk} of 4 KiB a second. {m['cpu']}, {m['cores']} cores; others took {found.cpu_of_others:.0%} of the "
        "cores."
    )
    return made


def command(
    path: Annotated[Path, typer.Option(help="Directory that keeps the stored context for the next run.")],
    context: Annotated[str, typer.Option(help="Tokens. 16 KiB of KV each by default: 2560K are 40 GiB.")] = "2560K",
    host_budget: Annotated[str, typer.Option(help="Host memory for KV.")] = "2GiB",
    kind: Annotated[str, typer.Option(help=f"Of heads: {', '.join(offload.KINDS)}.")] = RETRIEVAL,
    drift: Annotated[float, typer.Option(help="Share of a query that is the last step's: 0 forgets, 1 stands.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Keys with this share of the largest weight are attended.")] = 0.012,
    eviction: Annotated[str, typer.Option(help="Policy of pages.")] = "lru",
    guess: Annotated[str, typer.Option(help="Policy of reading ahead.")] = "none",
    compute: Annotated[float, typer.Option(help="Milliseconds between two layers' attention, as of a model.")] = 0.0,
    index_budget: Annotated[
        str | None,
        typer.Option(help="Memory for codes; the others stay on disk. [dim]default: all[/dim]", show_default=False),
    ] = None,
    parts: Annotated[float, typer.Option(help="Deviations by which parts of 64 tokens are left out; 0: none.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    bits: Annotated[int, typer.Option(help="Of a coded number: 4 or 8.")] = 4,
    layers: int = 8,
    kv_heads: int = 4,
    group: int = 4,
    head_dim: int = 64,
    steps: Annotated[int, typer.Option(help="Steps measured.")] = 20,
    warm: Annotated[int, typer.Option(help="Steps before.")] = 20,
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures nothing.")] = False,
) -> None:
    """Decode a stored context larger than memory. Example: alaya-tiers bench larger --path /mnt/ssd/larger"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        tokens, host = 4096 if quick else parse_contexts(context)[0], parse_bytes("16MiB" if quick else host_budget)
        heads = HeadsPlan(
            layers=layers,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            dtype=dtype,
            alpha=alpha,
            bits=bits,
            passages=kind == RETRIEVAL,
            parts=parts,
        )
        if tokens < CHUNK // 2:
            raise ConfigError(f"--context must be at least {CHUNK // 2} tokens")
        plan = offload.Plan(
            tokens=tokens, times=tokens * heads.token_bytes / host, kind=kind, drift=drift, ways=((eviction, guess),),
            heads=heads, steps=2 if quick else steps, warm=1 if quick else warm, compute=compute / 1e3, path=path,
        )  # fmt: skip
        with errors.status("disk") as status:
            found = run(plan, host, None if index_budget is None else parse_bytes(index_budget), status.update)
    show([table(found)], found.as_dict(), json_file)


if __name__ == "__main__":
    bring(sys.argv[1], int(sys.argv[2]))
