"""`alaya-tiers verify` and `gc`: whether a store is whole, what can be done about it, and what nothing needs."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from alaya_tiers.commit import lent, load_generation, load_manifest
from alaya_tiers.config import format_bytes
from alaya_tiers.errors import InputError, StoreLocked
from alaya_tiers.leftovers import leftovers
from alaya_tiers.repair import Examined, examine, repair, salvage
from alaya_tiers.seams import SystemDisk
from alaya_tiers.snapshot import Shelf
from alaya_tiers.tools.stored import AsJson, Directory, counted

DAMAGED = 1
"""Exit code, beside 0."""


@contextmanager
def held(path: Path) -> Iterator[SystemDisk]:
    """A disk while nobody else may write this store. Raises StoreLocked."""
    disk = SystemDisk()
    try:
        lock = disk.claim(str(path.absolute()))
    except BlockingIOError as error:
        raise StoreLocked(
            error.errno, "another process has this store open for writing; close it there", path
        ) from error
    try:
        yield disk
    finally:
        disk.close(lock)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)


def verify(
    path: Directory,
    mend: Annotated[bool, typer.Option("--repair", help="Make the store whole again, in its place.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Repair without asking, even if contexts become shorter.")] = False,
    into: Annotated[
        Path | None,
        typer.Option("--salvage", help="Copy all that is undamaged into this new store.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reads everything a store holds and compares it with its digests.

    --repair removes or rewrites what is damaged. Keys and values that are damaged cannot be had back: contexts that
    need them end before them then, or go; they are listed, and it asks first. Nothing undamaged is ever removed.
    --salvage leaves the store as it is. Exits with 1 if something is (or was) damaged, with 2 if it cannot be opened.
    """
    root = str(path.absolute())
    if mend and into is not None:
        raise InputError("--repair changes the store and --salvage leaves it as it is: choose one")
    with progress("reading") as say:
        found = examine(SystemDisk(), root, say)
    report = reported(found)
    if not as_json:
        shown(found)
    if into is not None:
        with progress("copying") as say:
            saved = salvage(SystemDisk(), root, found, str(into.absolute()), say)
        report["salvaged"] = {c.id: c.tokens for c in saved.contexts.values()}
        if not as_json:
            print(f"{counted(len(saved.contexts))} in {into}, {format_bytes(sum(saved.files.values()))}.")
    elif mend and found.damage:
        if found.lost and not yes:
            agreed(found)
        with held(path) as disk:
            repair(disk, root, examine(disk, root, lambda done, of: None))
            after = examine(disk, root, lambda done, of: None)
        report["left"] = [d._asdict() for d in after.damage]
        if not as_json:
            left = f"[bold red]{len(after.damage)} things are damaged still[/]" if after.damage else "All is whole now"
            Console().print(f"{left}: {counted(len(after.manifest.contexts))}.")
    if as_json:
        print(json.dumps(report))
    if found.damage:
        raise typer.Exit(DAMAGED)


def reported(found: Examined) -> dict[str, Any]:
    """As JSON values. lost: contexts that repair makes shorter, and how many tokens are left of each."""
    hurt = sorted({context for one in found.damage for context in one.contexts})
    return {
        "contexts": len(found.manifest.contexts),
        "bytes": sum(found.manifest.files.values()),
        "damaged": hurt,
        "lost": found.lost,
        "damage": [d._asdict() for d in found.damage],
    }


def shown(found: Examined) -> None:
    """The same for people."""
    console, hurt = Console(soft_wrap=True), {c for one in found.damage for c in one.contexts}
    for one in found.damage:
        console.print(f"[bold red]damaged[/] {one.kind} {one.path}: {one.problem}", highlight=False)
    for context, tokens in found.lost.items():
        of = found.manifest.contexts[context].tokens
        console.print(f"  of {context[:12]} the first {tokens:,} of {of:,} tokens are whole", highlight=False)
    total, count = format_bytes(sum(found.manifest.files.values())), counted(len(found.manifest.contexts))
    if not found.damage:
        console.print(f"{count}, all whole; {total} read.")
    elif found.lost:
        console.print(
            f"[bold red]{len(hurt)} of {count} damaged[/]; {total} read. --repair or --salvage keep the rest."
        )
    else:
        console.print(f"[bold yellow]{count}, keys and values whole[/]; {total} read. --repair mends the rest.")


def agreed(found: Examined) -> None:
    """Ask whether contexts may become shorter. Raises typer.Abort, InputError where nobody can be asked."""
    what = f"{counted(len(found.lost))} will end before the damage or be gone"
    if not sys.stdin.isatty():
        raise InputError(f"{what}: say --yes to repair, or --salvage NEW to keep this store as it is")
    typer.confirm(f"{what}. Repair?", abort=True)


def gc(
    path: Directory,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Removes what nothing in a store needs: leftovers of processes that were killed.

    Every opening for writing does so too. What a reader of an older generation still needs stays.
    """
    root = str(path.absolute())
    with held(path) as disk:
        Shelf(root, None, disk).check()
        manifest = load_manifest(disk, root)
        readers = {n: load_generation(disk, root, n) for n in lent(disk, root, manifest.generation)}
        found = {name: size(Path(name)) for name in leftovers(disk, root, manifest, readers)}
        if not dry_run:
            for name in found:
                disk.remove(name)
    names = {os.path.relpath(name, root): nbytes for name, nbytes in found.items()}
    if as_json:
        print(json.dumps({"removed": not dry_run, "bytes": sum(names.values()), "paths": names}))
        return
    for name, nbytes in names.items():
        Console(soft_wrap=True).print(f"{name}  [dim]{format_bytes(nbytes)}[/]", highlight=False)
    verb = "would be removed" if dry_run else "removed"
    print(f"{len(names)} leftovers {verb}, {format_bytes(sum(names.values()))}." if names else "Nothing to remove.")


def size(path: Path) -> int:
    """Bytes on disk of a file, or of all below a folder; links are not followed."""
    files = [p for p in path.rglob("*") if not p.is_symlink()] if path.is_dir() and not path.is_symlink() else [path]
    return sum(p.lstat().st_blocks * 512 for p in files)
