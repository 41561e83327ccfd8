"""`alaya-tiers ls`: what a store holds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.manifest import Manifest

Directory = Annotated[Path, typer.Argument(help="A store: the path given to DB().", exists=True, file_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")]


@contextmanager
def opened(path: Path) -> Iterator[Contexts]:
    """The contexts of a store. Raises StoreError."""
    engine = Engine(Settings(), str(path))
    try:
        yield Contexts(engine)
    finally:
        engine.close()


def listed(manifest: Manifest) -> list[dict[str, Any]]:
    """The contexts, oldest first. bytes: on disk; shared_bytes: those of them that other contexts have too."""
    files = {context: manifest.files_of(context) for context in manifest.contexts}
    users: dict[str, int] = {}
    for of_context in files.values():
        for name in of_context:
            users[name] = users.get(name, 0) + 1
    report = []
    for context in sorted(manifest.contexts.values(), key=lambda c: c.created):
        identity = manifest.identities[manifest.root(context.id)]
        sizes = {name: manifest.files[name] for name in files[context.id]}
        report.append(
            asdict(context)
            | {"created": datetime.fromtimestamp(context.created, UTC).isoformat(timespec="seconds")}
            | {"bytes": sum(sizes.values()), "shared_bytes": sum(n for f, n in sizes.items() if users[f] > 1)}
            | {"dtype": identity.dtype, "lossy": identity.lossy, "weights": identity.weights}
        )
    return report


def ls(path: Directory, as_json: AsJson = False) -> None:
    """Lists the contexts a store holds."""
    with opened(path) as contexts:
        report = listed(contexts.manifest)
        model = contexts.engine.store.model or {}
        total = sum(contexts.manifest.files.values())
    if as_json:
        print(json.dumps({"model": model, "bytes": total, "contexts": report}, indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("context", "left"), ("tokens", "right"), ("on disk", "right"), ("shared", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("dtype", "", "stored"):
        table.add_column(name, no_wrap=True)
    for row in report:
        sizes = (format_bytes(row["bytes"]), format_bytes(row["shared_bytes"]))
        lossy = "lossy" if row["lossy"] else "exact"
        table.add_row(row["id"][:12], f"{row['tokens']:,}", *sizes, row["dtype"], lossy, row["created"][:16])
    console = Console()
    if report:
        console.print(table)
    kind = f" of a {model['model_type']} model" if "model_type" in model else ""
    console.print(f"{counted(len(report))}{kind}, {format_bytes(total)} on disk.")


def counted(n: int) -> str:
    """So many contexts, in words."""
    return "1 context" if n == 1 else f"{n:,} contexts"
