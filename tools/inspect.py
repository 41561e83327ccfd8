"""``alaya-tiers inspect``: pictures of a recorded run: what heads attend and find, where blocks are, one step."""

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import profile, reporting
from alaya_tiers.tools.events import Own, Read
from alaya_tiers.tools.phases import Part
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.recorded import Recording, open_recording
from alaya_tiers.tools.replay import Replay
from alaya_tiers.tools.reporting import need_matplotlib, out_file

BINS = 256
"""Pieces the context is cut into."""

SAMPLES = 4000
"""Moments of the residency that are drawn at most."""

TIERS = ("device", "host", "ssd only")


@dataclass(slots=True)
class Seen:
    """What a recording shows. tokens: the longest context.

    attended: keys found by (layer, head) in each piece of the context, float [BINS]. sizes: keys found by (layer, head)
    at each sparse read, -1 where it read everything. steps: for each single-token step, (layer, end, seconds) of its
    attention, in order.
    """

    tokens: int = 1
    attended: dict[tuple[int, int], npt.NDArray[np.float64]] = field(default_factory=dict)
    sizes: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    steps: list[list[tuple[int, float, float]]] = field(default_factory=list)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of all heads that looked for keys, in order."""
        return sorted(self.sizes)


@dataclass(slots=True)
class Residency:
    """Seconds, and bytes in each of TIERS then."""

    times: list[float] = field(default_factory=list)
    nbytes: list[tuple[int, int, int]] = field(default_factory=list)

    def note(self, replay: Replay, part: Part, read: Read) -> None:
        """A replay's probe."""
        mover = replay.mover
        book = mover.ledger
        alive = book.alive()
        sizes = mover.sizes(alive)
        device, host = book.device[alive] >= 0, book.host[alive] >= 0
        rest = ~device & ~host
        self.times.append(replay.loop.now)
        self.nbytes.append((int(sizes[device].sum()), int(sizes[host].sum()), int(sizes[rest].sum())))


def look(recording: Recording) -> Seen:
    """One pass over the events. Raises TraceError."""
    seen, layer_of = Seen(), {}
    seen.tokens = max((e.tokens for e in recording.events() if isinstance(e, Read)), default=1)
    width = -(-seen.tokens // BINS)
    for event in recording.events():
        match event:
            case Own():
                layer_of[event.x] = event.layer
            case Read():
                layer = layer_of[event.x]
                for found in event.found:
                    for head, positions in zip(found.heads, found.positions, strict=True):
                        _count(seen, layer, head, positions, width)
                    for head in found.flat:
                        seen.sizes.setdefault((layer, head), []).append(-1)
                if event.queries == 1:
                    if not seen.steps or (seen.steps[-1] and layer <= seen.steps[-1][-1][0]):
                        seen.steps.append([])
                    seen.steps[-1].append((layer, event.time, event.seconds))
            case _:
                pass
    return seen


def _count(seen: Seen, layer: int, head: int, positions: npt.NDArray[np.int64], width: int) -> None:
    seen.sizes.setdefault((layer, head), []).append(positions.size)
    row = seen.attended.setdefault((layer, head), np.zeros(BINS))
    row += np.bincount(positions // width, minlength=BINS)[:BINS]


def residency(recording: Recording, known: Profile) -> Residency:
    """Where the blocks were, by replaying the run with its own settings. Raises TraceError, ConfigError."""
    found = Residency()
    Replay(recording, recording.settings, known, found.note).run()
    every = max(1, len(found.times) // SAMPLES)
    found.times, found.nbytes = found.times[::every], found.nbytes[::every]
    return found


# ---------------------------------------------------------------------- pictures
def heat(axes: Any, seen: Seen) -> None:
    """Which tokens each head attends beyond the window."""
    if not seen.attended:
        return _nothing(axes, "no head looked for keys: exact attention reads everything")
    heads = seen.heads
    rows = np.array([seen.attended.get(head, np.zeros(BINS)) for head in heads])
    pictured = axes.imshow(np.log10(1 + rows), aspect="auto", cmap="magma", extent=(0, seen.tokens, len(heads), 0))
    axes.figure.colorbar(pictured, ax=axes, label="log10 (1 + times attended)")
    axes.set(xlabel="position", title="tokens each head attends, beyond the window")
    _layers(axes, heads)
    return None


def sizes(axes: Any, seen: Seen) -> None:
    """How many keys each head found, step by step."""
    if not seen.sizes:
        return _nothing(axes, "no head looked for keys")
    heads = seen.heads
    rows = np.full((len(heads), max(map(len, seen.sizes.values()))), np.nan)
    for i, head in enumerate(heads):
        rows[i, : len(seen.sizes[head])] = seen.sizes[head]
    shown = np.log10(1 + np.where(rows < 0, np.nan, rows))
    pictured = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(pictured, ax=axes, label="log10 (1 + keys found)")
    axes.set(xlabel="step", title="DIPR set sizes (white: it read everything)")
    _layers(axes, heads, 0.5)
    return None


def places(axes: Any, found: Residency) -> None:
    """Bytes by tier over time."""
    if not found.times:
        return _nothing(axes, "nothing was read")
    unit = 1 << 20
    stacked = np.array(found.nbytes).T / unit
    axes.stackplot(found.times, stacked, labels=TIERS, colors=("tab:green", "tab:cyan", "tab:blue"), alpha=0.8)
    axes.set(xlabel="seconds, simulated", ylabel="MiB of KV", title="where the KV is")
    axes.legend(loc="upper left")
    return None


def timeline(axes: Any, seen: Seen, number: int) -> None:
    """One step: attention of each layer, and what lies between."""
    if not seen.steps:
        return _nothing(axes, "no step of a single token")
    step = seen.steps[min(number, len(seen.steps) - 1)]
    began = step[0][1] - step[0][2]
    for layer, end, seconds in step:
        axes.broken_barh([((end - seconds - began) * 1e3, seconds * 1e3)], (layer - 0.4, 0.8), color="tab:orange")
    whole = (step[-1][1] - began) * 1e3
    attention = sum(seconds for _, _, seconds in step) * 1e3
    axes.set(xlabel="ms", ylabel="layer", title=f"step {number}: {attention:.1f} of {whole:.1f} ms in attention")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    return None


PICTURES = ("heat", "sizes", "residency", "timeline")


def _layers(axes: Any, heads: list[tuple[int, int]], shift: float = 0.0) -> None:
    first = [i for i, (layer, _) in enumerate(heads) if i == 0 or heads[i - 1][0] != layer]
    every = max(1, len(first) // 16)
    axes.set_yticks([i - shift for i in first][::every], [str(heads[i][0]) for i in first][::every])
    axes.set_ylabel("layer (rows: kv heads)")


def _nothing(axes: Any, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)


def draw(axes: Any, name: str, seen: Seen, found: Residency, step: int) -> None:
    """One of PICTURES."""
    match name:
        case "heat":
            heat(axes, seen)
        case "sizes":
            sizes(axes, seen)
        case "residency":
            places(axes, found)
        case _:
            timeline(axes, seen, step)


def save(path: Path, recording: Recording, known: Profile, step: int, pictures: tuple[str, ...] = PICTURES) -> Seen:
    """All pictures in one PNG, or one after the other in one HTML page. Needs matplotlib.

    Raises TraceError, ConfigError.
    """
    pyplot = reporting.pyplot()
    seen, found = look(recording), Residency()
    if "residency" in pictures:
        found = residency(recording, known)
    try:
        if path.suffix == ".png":
            size = (11, 4 * len(pictures))
            figure, axes = pyplot.subplots(len(pictures), figsize=size, layout="constrained", squeeze=False)
            for one, name in zip(axes[:, 0], pictures, strict=True):
                draw(one, name, seen, found, step)
            figure.savefig(path, dpi=100)
            pyplot.close(figure)
        else:
            path.write_text(_page(pyplot, recording, seen, found, step, pictures), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write pictures to {path}: {error}") from error
    return seen


def _page(pyplot: Any, recording: Recording, seen: Seen, found: Residency, step: int, pictures: tuple[str, ...]) -> str:
    parts = []
    for name in pictures:
        figure, axes = pyplot.subplots(figsize=(11, 4.2), layout="constrained")
        draw(axes, name, seen, found, step)
        data = io.BytesIO()
        figure.savefig(data, dpi=100, format="png")
        pyplot.close(figure)
        encoded = base64.b64encode(data.getvalue()).decode()
        parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{encoded}"></p>')
    title = html.escape(f"{recording.path.name}: {seen.tokens:,} tokens, {len(seen.steps)} steps")
    style = "body { font-family: sans-serif; margin: 2em auto; max-width: 1120px } img { max-width: 100% }"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style>"
    return f"{head}<h1>{title}</h1>{''.join(parts)}\n"


EPILOG = "Example: [bold]alaya-tiers inspect trace.jsonl -o pictures.html[/bold]"


def command(
    trace: Annotated[Path, typer.Argument(help="A recorded trace.")],
    output: Annotated[Path, out_file("A .png or .html file.")] = Path("inspect.html"),
    step: Annotated[int, typer.Option(min=0, help="The step whose timeline is drawn.")] = 0,
    only: Annotated[str | None, typer.Option(help=f"Of {', '.join(PICTURES)}, with commas.")] = None,
    profile_file: Annotated[Path | None, typer.Option("--profile", help="Of the machine, for the residency.")] = None,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="The profile may be another machine's.")] = False,
) -> None:
    """Draws what a recorded run did: tokens each head attends, DIPR set sizes, residency over time, one step."""
    need_matplotlib(output)
    if output.suffix not in (".png", ".html"):
        raise ConfigError(f"pictures are .png or .html, not {output.suffix!r}")
    chosen = PICTURES if only is None else tuple(name.strip() for name in only.split(","))
    if unknown := [name for name in chosen if name not in PICTURES]:
        raise ConfigError(f"no picture {unknown[0]!r}; there are {', '.join(PICTURES)}")
    known = profile.TYPICAL if profile_file is None else profile.load(profile_file, any_machine=any_machine)
    with Console(stderr=True).status("drawing"):
        seen = save(output, open_recording(trace), known, step, chosen)
    told = f"{seen.tokens:,} tokens, {len(seen.steps)} steps, {len(seen.sizes)} heads that looked for keys"
    print(f"{output} ({format_bytes(output.stat().st_size)}): {told}")
