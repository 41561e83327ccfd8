"""How every benchmark ends: tables for people, all numbers for programs, pictures, errors in one line."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from alaya_tiers.errors import AlayaError, ConfigError

WIDTH = 132
"""Columns of a table that does not go to a terminal: in 80, the widest would lose their headings."""


def place(path: Path | None) -> Path | None:
    """Refuse a file nobody could write now, not after an hour of measuring."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is not a directory: make it first")
    return path


def out_file(words: str) -> Any:
    """The option of a file to write: refused before anything is done where it could not be."""
    return typer.Option("--output", "-o", help=words, dir_okay=False, callback=place)


def told(seconds: float) -> str:
    """A time for people: 12 ms, 1.5 s, 4.2 min, 15.7 h."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= (2 if unit in ("h", "min") else 1) * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1e3:,.1f} ms"


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write all numbers to a file; - is stdout.", dir_okay=False, callback=place),
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="Draw a PNG; needs matplotlib.", dir_okay=False, callback=place)
]


@contextmanager
def one_line_errors(console: Console) -> Iterator[None]:
    """What goes wrong is one line and an exit code: 2 for options that make no sense, 1 for all else."""
    try:
        yield
    except (AlayaError, OSError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def need_matplotlib(plot_file: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything is measured.

    Raises:
        ConfigError: a picture is asked for and matplotlib is not installed.
    """
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install 'alaya-tiers[plots]'")


def pyplot() -> Any:
    """matplotlib's, loaded when a picture is drawn."""
    return importlib.import_module("matplotlib.pyplot")


def results(json_file: Path | None = None) -> Console:
    """Where tables go: stdout, or stderr where stdout is for the numbers; wide enough where it is no terminal."""
    console = Console(stderr=json_file is not None and str(json_file) == "-")
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    return console


def show(made: Iterable[RenderableType], facts: dict[str, Any], json_file: Path | None) -> None:
    """Print what was found, and write all of it where a file was named."""
    console = results(json_file)
    for each in made:
        console.print(each)
    write(facts, json_file)


def write(facts: dict[str, Any], json_file: Path | None) -> None:
    """All numbers into a file, or to stdout; without a file, nothing."""
    if json_file is None:
        return
    text = json.dumps(facts, indent=1) + "\n"
    if str(json_file) == "-":
        sys.stdout.write(text)
    else:
        json_file.write_text(text, encoding="utf-8")
