"""``alaya-tiers bench quality``: what sparse attention loses, on models whose answers can be checked.

Two models of our own: one that was trained (`train.py`: natural attention, loss on a text it has not seen, recall) and
one that is computed (`quotation.py`, any length; `quoted.py` measures it). A context is prefilled exactly, once; every
way to attend starts from its keys and values and reads what follows in single steps, told the true token after each
(teacher-forced), since only decode steps are sparse. An answer is right if each of its tokens was the most likely one:
greedy decoding gives it then too. DIPR (a share alpha of the largest weight) is compared with top-k at equal tokens: k
is the mean number of keys that DIPR attended beyond the window. So that this is what is compared, no layer attends
exactly where that would be faster, as it would in use: answers in use can only be nearer to full attention.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.stats import SparseUse
from alaya_tiers.tools import machine, quoted, reporting
from alaya_tiers.tools.baselines import parse_contexts
from alaya_tiers.tools.corpus import read_text
from alaya_tiers.tools.demo import load
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.recall import Question, Tasks
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, results, write

Say = Callable[[str], None]

TASKS = ("text", "quote", "pairs")
ALPHAS = "0.1,0.03,0.012,0.003,0.001"
CHUNK = 512
WINDOW: dict[str, Any] = {"block_tokens": 16, "segment_tokens": 256, "sink_tokens": 16, "recent_tokens": 32}
"""A small window, so that contexts of a few thousand tokens are attended sparsely."""

SPARSE: dict[str, Any] = {"mode": "sparse", "read_rate": 1.0}
"""Reading in order is slow, or contexts this short would be."""

MODEL = Path(__file__).resolve().parent.parent / "tests" / "data" / "recall"
"""The trained model of the source tree."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to attend: DynamicCache (settings None), or AlayaCache with these settings."""

    name: str
    settings: dict[str, Any] | None

    @classmethod
    def dipr(cls, alpha: float) -> "Way":
        """Keys with this share of the largest weight."""
        return cls(f"DIPR {alpha:g}", SPARSE | {"alpha": alpha})

    @classmethod
    def top(cls, k: int) -> "Way":
        """The k nearest keys of every kv head."""
        return cls(f"top-{k}", SPARSE | {"alpha": quoted.EVERYTHING, "most_selected": k})


FULL, EXACT = Way("DynamicCache", None), Way("exact", {})


@dataclass(slots=True)
class Asked:
    """A context that was read, and what is asked about it."""

    cache: DynamicCache
    questions: list[Question]


@dataclass(slots=True)
class Scored:
    """How one way did on one task at one length. loss: nats of each token of an answer; sure: was it the likeliest."""

    task: str
    tokens: int
    way: str
    loss: list[list[float]] = field(default_factory=list)
    sure: list[list[bool]] = field(default_factory=list)
    use: SparseUse | None = None

    @property
    def right(self) -> list[bool]:
        """Of each answer, whether every token was the likeliest."""
        return [all(answer) for answer in self.sure]

    @property
    def beyond(self) -> float:
        """Keys attended beyond the window, of a query."""
        return 0.0 if self.use is None else (self.use.attended - self.use.window) / max(1, self.use.steps)

    def as_dict(self, full: "Scored") -> dict[str, Any]:
        """JSON values. lost: tokens that are the likeliest with full attention and not here; gained: the other way."""
        sure = [x for answer in self.sure for x in answer]
        pairs = list(zip((x for answer in full.sure for x in answer), sure, strict=True))
        return {
            "task": self.task, "tokens": self.tokens, "way": self.way,
            "answers": len(self.sure), "right": sum(self.right), "answer_tokens": len(sure), "likeliest": sum(sure),
            "lost": sum(a and not b for a, b in pairs), "gained": sum(b and not a for a, b in pairs),
            "loss": float(np.mean([x for answer in self.loss for x in answer])),
            "beyond_tokens": self.beyond, "sparse": None if self.use is None else self.use.as_dict(),
        }  # fmt: skip


@torch.no_grad()
def prefilled(model: Any, ids: Tensor) -> DynamicCache:
    """The keys and values of a context, exactly."""
    cache = DynamicCache(config=model.config)
    for start in range(0, ids.numel(), CHUNK):
        model.base_model(input_ids=ids[None, start : start + CHUNK].to(model.device), past_key_values=cache)
    return cache


@contextmanager
def attending(model: Any, context: DynamicCache, way: Way) -> Iterator[DynamicCache]:
    """A cache with a context, attended in a way; the index is complete."""
    if way.settings is None:
        yield context
        return
    layers: list[Any] = context.layers
    room = 2 * sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) + (16 << 20)
    budgets = {"device_budget": room, "host_budget": "16MiB", "measure_mass": True}
    model.set_attn_implementation("alaya")
    try:
        with AlayaCache.from_dynamic(context, model.config, **(WINDOW | budgets | way.settings)) as cache:
            cache.build_index()
            yield cache
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def answered(model: Any, cache: DynamicCache, question: Question) -> tuple[list[float], list[bool]]:
    """Loss of each token of the answer, and whether it was the likeliest, in single steps on a fork."""
    fork, loss, sure = copy.deepcopy(cache), list[float](), list[bool]()
    tokens = [*question.prompt, *question.answer]
    for place, token in enumerate(tokens[:-1]):
        one = torch.tensor([[token]], device=model.device)
        logits = model(input_ids=one, past_key_values=fork).logits[0, -1].float()
        if place + 1 >= len(question.prompt):
            loss.append(-float(torch.log_softmax(logits, -1)[tokens[place + 1]]))
            sure.append(int(logits.argmax()) == tokens[place + 1])
    fork.reset()  # type: ignore[no-untyped-call] # a fork is part of a reference cycle: give its blocks back now
    return loss, sure


def score(model: Any, asked: Sequence[Asked], way: Way, task: str, tokens: int) -> Scored:
    """All questions about all contexts."""
    found = Scored(task, tokens, way.name)
    for context in asked:
        with attending(model, context.cache, way) as cache:
            for question in context.questions:
                loss, sure = answered(model, cache, question)
                found.loss.append(loss)
                found.sure.append(sure)
            use = cache.stats().sparse if isinstance(cache, AlayaCache) else None
            found.use = use if found.use is None or use is None else found.use.plus(use)
    return found


def trained(
    model: Any, tasks: Tasks, lengths: Sequence[int], alphas: Sequence[float], contexts: int, count: int, say: Say
) -> Iterator[list[Scored]]:
    """Every way on every task and length, full attention first. count: questions about a context, or tokens of text."""
    for number, (task, tokens) in enumerate((task, n) for task in TASKS for n in lengths):
        rng = np.random.default_rng([2, number])
        asked = []
        for _ in range(contexts):
            say(f"{task}, {tokens:,} tokens: reading")
            ids, questions = tasks.questions(task, tokens, 8 * count if task == "text" else count, rng)
            asked.append(Asked(prefilled(model, torch.from_numpy(ids)), questions))
        row = []
        for way in (FULL, EXACT):
            say(f"{task}, {tokens:,} tokens: {way.name}")
            row.append(score(model, asked, way, task, tokens))
        for alpha in alphas:
            say(f"{task}, {tokens:,} tokens: alpha {alpha:g}")
            row.append(score(model, asked, Way.dipr(alpha), task, tokens))
            if row[-1].use is not None and row[-1].use.steps:
                row.append(score(model, asked, Way.top(max(1, round(row[-1].beyond))), task, tokens))
        yield row


@dataclass(slots=True)
class Found:
    """All that was measured."""

    machine: dict[str, Any]
    model: str
    contexts: int
    trained: list[list[Scored]]
    quoted: list[quoted.Quoted]
    cpu_of_others: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "benchmark": "quality", "machine": self.machine, "cpu_of_others": self.cpu_of_others,
            "window": WINDOW, "model": self.model, "contexts": self.contexts,
            "trained": [scored.as_dict(row[0]) for row in self.trained for scored in row],
            "quoted": [each.as_dict() for each in self.quoted],
        }  # fmt: skip


def trained_table(row: Sequence[Scored]) -> Table:
    """One task at one length."""
    full = row[0]
    title = f"{full.task}, {full.tokens:,} tokens, {len(full.sure)} answers of {len(full.sure[0])} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("attended by")
    for name in ("loss", "right", "likeliest", "lost", "gained", "beyond window", "of all", "mass", "least", "error"):
        table.add_column(name, justify="right")
    for scored in row:
        facts = scored.as_dict(full)
        shown = [f"{facts['loss']:.4f}", *(str(facts[name]) for name in ("right", "likeliest", "lost", "gained"))]
        table.add_row(scored.way, *shown, *_use(facts["sparse"], scored.beyond))
    return table


def _use(use: dict[str, Any] | None, beyond: float) -> list[str]:
    if use is None or not use["steps"]:
        return ["all"]
    names = ("true_recovered_mass", "true_least_recovered_mass", "output_error")
    return [f"{beyond:,.1f}", f"{use['attended_share']:.1%}", *(f"{use[name]:.3f}" for name in names)]


def plot(found: Found, path: Path) -> None:
    """Loss above full attention and share of answers kept, over the share of tokens attended. Needs matplotlib."""
    pyplot = reporting.pyplot()
    tasks = [task for task in TASKS if any(row[0].task == task for row in found.trained)]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for place, task in zip(axes[0], tasks, strict=True):
        for row in (row for row in found.trained if row[0].task == task):
            facts = [scored.as_dict(row[0]) for scored in row]
            for kind, style in (("DIPR", "o-"), ("top", "x--")):
                points = [f for f in facts if f["way"].startswith(kind) and f["sparse"]["steps"]]
                x = [f["sparse"]["attended_share"] for f in points]
                y = [f["loss"] - facts[0]["loss"] for f in points]
                place.plot(x, y, style, label=f"{kind}, {row[0].tokens:,} tokens")
        place.set(title=task, xlabel="share of tokens attended", ylabel="loss above full attention, nats")
        place.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def subject(folder: Path, text: Path | None) -> tuple[Any, Tasks]:
    """A model in float32, so that nothing differs but the attention, and the tasks over a text. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"no model in {folder}: make one with alaya-tiers train, and give its folder with --model")
    tokenizer, model = load(str(folder), torch.float32)
    ids = tokenizer(read_text(folder / "unseen.txt" if text is None else text)).input_ids
    return model, Tasks(np.array(ids, np.int64), len(tokenizer))


def command(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A folder made by alaya-tiers train. [dim]default: the one in tests/data[/dim]", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text. [dim]default: one the model has not seen; the standard library[/dim]", show_default=False
        ),
    ] = None,
    contexts: Annotated[str, typer.Option(help="Tokens for the trained model; 0: leave it out.")] = "1K,2K,4K",
    quotation: Annotated[str, typer.Option(help="Words for the quotation model; 0: leave it out.")] = "16K,128K",
    alphas: Annotated[str, typer.Option(help="Shares of the largest weight to try.")] = ALPHAS,
    each: Annotated[int, typer.Option(min=1, help="Contexts of each task and length.")] = 4,
    questions: Annotated[int, typer.Option(min=1, help="Questions about each.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default=False)] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures little.")] = False,
) -> None:
    """What sparse attention loses against full attention. The SSD tier is where ALAYA_TIERS_DIR says.

    Example: alaya-tiers bench quality --quotation 16K,128K,1M
    """
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        if threads is not None:
            torch.set_num_threads(threads)
        lengths, words = ([] if x == "0" else parse_contexts(x) for x in (contexts, quotation))
        shares = [_share(word) for word in alphas.split(",")]
        if plot_file is not None and not lengths:
            raise ConfigError("--plot draws what was measured on the trained model: give --contexts")
        if quick:
            lengths, words, shares, each, questions = lengths and [512], words and [2048], shares[:1], 1, 2
        began, folder = CpuUse.now(), MODEL if model is None else model
        found = Found(machine.describe(), folder.name, each, [], [])
        console = results(json_file)

        def keep(made: Table) -> None:
            """Show and write what there is so far: all of it takes long."""
            console.print(made)
            found.cpu_of_others = CpuUse.now().others_since(began)
            if str(json_file) != "-":
                write(found.as_dict(), json_file)

        with errors.status("quality") as status:
            if lengths:
                net, known = subject(folder, text)
                for row in trained(net, known, lengths, shares, each, questions, status.update):
                    found.trained.append(row)
                    keep(trained_table(row))
            for n in words:
                found.quoted.append(quoted.run(n, shares, questions, text, status.update))
                keep(quoted.table(found.quoted[-1]))
    console.print(f"Others took {found.cpu_of_others:.0%} of the cores.")
    write(found.as_dict(), json_file)
    if plot_file is not None:
        plot(found, plot_file)


def _share(word: str) -> float:
    try:
        alpha = float(word)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha <= 1:
        raise ConfigError(f"--alphas takes shares above 0 and at most 1, such as {ALPHAS}, not {word!r}")
    return alpha
