"""``alaya-tiers bench choice``: DIPR against top-k, head by head.

Both choose keys by their exact scores; what differs is how many. DIPR takes what has at least the share alpha of the
largest weight, a number of its own for each query; top-k takes the same number everywhere. Compared at equal tokens (k
is what DIPR took on average) and at equal quality (the k whose mean mass is DIPR's). The heads are synthetic, or those
of a model that reads a text. Source: AlayaDB (arXiv 2504.10326), 6.1.1.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine, reporting
from alaya_tiers.tools.corpus import read_text
from alaya_tiers.tools.demo import load
from alaya_tiers.tools.heads import Heads, Plan
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show

SPREADS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Standard deviations of the scores of the heads that are compared: a model has all kinds."""

ALPHAS = (0.1, 0.03, 0.012, 0.003, 0.001)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to choose over all heads. tokens: mean of a query. mass, least: mean and least recovered."""

    name: str
    tokens: float
    mass: float
    least: float
    by_head: dict[str, tuple[float, float]]
    """Mean tokens, mean mass."""


@dataclass(frozen=True, slots=True)
class Compared:
    """DIPR at one alpha, top-k with as many tokens, and top-k with as much mass."""

    alpha: float
    dipr: Choice
    same_tokens: Choice
    same_mass: Choice

    @property
    def better(self) -> int:
        """Heads to which DIPR gives more mass than top-k with as many tokens over all heads."""
        theirs = self.same_tokens.by_head
        return sum(mass > theirs[head][1] for head, (_, mass) in self.dipr.by_head.items())


Weights = dict[str, Tensor]
"""By head: softmax weights, descending, float64 [queries, tokens]."""


def synthetic(tokens: int, queries: int) -> Weights:
    """Each kind of head."""
    plan = Plan(contexts=(tokens,), kv_heads=1, group=1, layers=1)
    heads = Heads(plan)
    keys = heads.chunk(0, 0, tokens)[0][0, 0].double()
    found = {}
    for spread in SPREADS:
        q = torch.cat([heads.queries(i, spread)[0, 0, 0] for i in range(queries)]).double()
        found[f"spread {spread:g}"] = (
            torch.softmax(q @ keys.T * plan.head_dim**-0.5, -1).sort(-1, descending=True).values
        )
    return found


@torch.no_grad()
def of_model(folder: str, text: Path | None, tokens: int, queries: int) -> Weights:
    """All heads of a model that reads a text (default: unseen.txt beside it), as its own queries and keys say.

    queries: of positions spread over the second half of the text. Raises ConfigError.
    """
    tokenizer, model = load(folder, torch.float32)
    ids = tokenizer(read_text(Path(folder) / "unseen.txt" if text is None else text)).input_ids[:tokens]
    if len(ids) < tokens:
        raise ConfigError(f"the text has {len(ids)} tokens, fewer than {tokens}: give a longer --text, or --tokens")
    at, found = torch.linspace(tokens // 2, tokens - 1, queries).long(), Weights()

    def record(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        group, scale = query.shape[1] // key.shape[1], options.get("scaling") or query.shape[-1] ** -0.5
        hidden = torch.arange(tokens) > at[:, None]
        for head in range(query.shape[1]):
            scores = query[0, head, at].double() @ key[0, head // group].double().T * scale
            seen = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
            found[f"layer {module.layer_idx} head {head}"] = seen.sort(-1, descending=True).values
        return sdpa_attention_forward(module, query, key, *args, **options)

    AttentionInterface.register("record", record)
    AttentionMaskInterface.register("record", sdpa_mask)
    model.set_attn_implementation("record")
    model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    return found


def choose(name: str, sorted_weights: Weights, counts: Weights) -> Choice:
    """What the first ``counts`` keys [queries] of each head recover."""
    by_head, masses = {}, []
    for head, w in sorted_weights.items():
        mass = w.cumsum(-1).gather(-1, (counts[head] - 1)[:, None])[:, 0]
        by_head[head] = (float(counts[head].double().mean()), float(mass.mean()))
        masses.append(mass)
    every = torch.cat(masses)
    tokens = sum(n for n, _ in by_head.values()) / len(by_head)
    return Choice(name, tokens, float(every.mean()), float(every.min()), by_head)


def top_k(w: Weights, k: int) -> Choice:
    """The same number of keys for every query of every head."""
    return choose(f"top-{k}", w, {head: torch.full((x.shape[0],), min(k, x.shape[1])) for head, x in w.items()})


def compare(w: Weights, alpha: float) -> Compared:
    """DIPR at ``alpha`` against top-k."""
    dipr = choose(f"DIPR {alpha:g}", w, {head: (x >= alpha * x[:, :1]).sum(-1) for head, x in w.items()})
    low, high = 1, next(iter(w.values())).shape[1]
    while low < high:  # the smallest k with as much mass
        middle = (low + high) // 2
        low, high = (low, middle) if top_k(w, middle).mass >= dipr.mass else (middle + 1, high)
    return Compared(alpha, dipr, top_k(w, max(1, round(dipr.tokens))), top_k(w, low))


def table(found: list[Compared], title: str) -> Table:
    """What was found, for people."""
    heads = sorted(found[0].dipr.by_head, key=lambda head: found[-1].dipr.by_head[head][0])
    shown = dict.fromkeys((heads[0], heads[len(heads) // 2], heads[-1]))
    made = Table(title=title, title_justify="left")
    for name in ("chosen by", "tokens", "mass", "least", *shown):
        made.add_column(name, justify="right")
    for each in found:
        for choice in (each.dipr, each.same_tokens, each.same_mass):
            by_head = (f"{choice.by_head[h][1]:.3f} of {choice.by_head[h][0]:,.0f}" for h in shown)
            made.add_row(choice.name, f"{choice.tokens:,.0f}", f"{choice.mass:.3f}", f"{choice.least:.3f}", *by_head)
        made.add_section()
    better = ", ".join(f"{each.better} ({each.alpha:g})" for each in found)
    made.caption, made.caption_justify = f"More mass by DIPR than by top-k at equal tokens, heads: {better}.", "left"
    return made


def plot(found: list[Compared], path: Path) -> None:
    """Mass and tokens of each head, DIPR beside top-k at equal tokens and at equal mass. Needs matplotlib."""
    pyplot = reporting.pyplot()
    figure, axes = pyplot.subplots(2, len(found), figsize=(4 * len(found), 7), squeeze=False)
    for column, each in enumerate(found):
        heads = sorted(each.dipr.by_head, key=lambda head: each.dipr.by_head[head][0])
        for choice, style in ((each.dipr, "o-"), (each.same_tokens, "x--"), (each.same_mass, "+:")):
            for row, part in enumerate((1, 0)):
                axes[row][column].plot([choice.by_head[h][part] for h in heads], style, label=choice.name)
        axes[0][column].set(title=f"alpha {each.alpha:g}", ylabel="mass", ylim=(0, 1.02))
        axes[1][column].set(xlabel="head, by the keys DIPR takes", ylabel="keys", yscale="log")
        axes[0][column].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def command(
    tokens: Annotated[
        int | None,
        typer.Option(help="Keys of a head. [dim]default: 131072, or 4096 of a model[/dim]", show_default=False),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(help="Queries of each head. [dim]default: 8, or 64 of a model[/dim]", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The heads of a model that reads a text: folder or hub id.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="The text. [dim]default: unseen.txt of the folder[/dim]", show_default=False)
    ] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """DIPR against top-k on heads of mixed sharpness, or those of a model.

    Example: alaya-tiers bench choice --model tests/data/recall
    """
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        tokens = (131_072 if model is None else 4096) if tokens is None else tokens
        queries = (8 if model is None else 64) if queries is None else queries
        if min(tokens, queries) < 1:
            raise ConfigError("--tokens and --queries must be positive")
        with errors.status("weights of all heads"):
            w = synthetic(tokens, queries) if model is None else of_model(model, text, tokens, queries)
    found = [compare(w, alpha) for alpha in ALPHAS]
    source = "synthetic heads" if model is None else f"heads of {Path(model).name}"
    facts = {"benchmark": "choice", "machine": machine.describe(), "tokens": tokens, "heads": source}
    made = table(found, f"{tokens:,} keys, {len(w)} {source}, {queries} queries each")
    show([made], facts | {"found": [asdict(each) for each in found]}, json_file)
    if plot_file is not None:
        plot(found, plot_file)
