"""``alaya-tiers bench choice``: DIPR against top-k, head by head.

Both choose keys by their exact scores; what differs is how many. DIPR takes what has at least the share alpha of the
largest weight, a number of its own for each query; top-k takes the same number everywhere. Compared at equal tokens (k
is what DIPR took on average) and at equal quality (the k whose mean mass is DIPR's). Source: AlayaDB (arXiv
2504.10326), 6.1.1.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine
from alaya_tiers.tools.bench import one_line_errors
from alaya_tiers.tools.heads import Heads, Plan

SPREADS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Standard deviations of the scores of the heads that are compared: a model has all kinds."""

ALPHAS = (0.1, 0.03, 0.012, 0.003, 0.001)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to choose over all heads. tokens: mean of a query. mass: mean and least recovered, by spread."""

    name: str
    tokens: float
    mass: float
    least: float
    by_head: dict[float, tuple[float, float]]
    """Spread of the scores: mean tokens, mean mass."""


@dataclass(frozen=True, slots=True)
class Compared:
    """DIPR at one alpha, top-k with as many tokens, and top-k with as much mass."""

    alpha: float
    dipr: Choice
    same_tokens: Choice
    same_mass: Choice


def weights(tokens: int, queries: int) -> dict[float, Tensor]:
    """Softmax weights of each kind of head, sorted, float64 [queries, tokens]."""
    plan = Plan(contexts=(tokens,), kv_heads=1, group=1, layers=1)
    heads = Heads(plan)
    keys = heads.chunk(0, 0, tokens)[0][0, 0].double()
    found = {}
    for spread in SPREADS:
        q = torch.cat([heads.queries(i, spread)[0, 0, 0] for i in range(queries)]).double()
        found[spread] = torch.softmax(q @ keys.T * plan.head_dim**-0.5, -1).sort(-1, descending=True).values
    return found


def choose(name: str, sorted_weights: dict[float, Tensor], counts: dict[float, Tensor]) -> Choice:
    """What the first ``counts`` keys [queries] of each head recover."""
    by_head, masses = {}, []
    for spread, w in sorted_weights.items():
        mass = w.cumsum(-1).gather(-1, (counts[spread] - 1)[:, None])[:, 0]
        by_head[spread] = (float(counts[spread].double().mean()), float(mass.mean()))
        masses.append(mass)
    every = torch.cat(masses)
    tokens = sum(n for n, _ in by_head.values()) / len(by_head)
    return Choice(name, tokens, float(every.mean()), float(every.min()), by_head)


def top_k(w: dict[float, Tensor], k: int) -> Choice:
    """The same number of keys for every query of every head."""
    return choose(f"top-{k}", w, {s: torch.full((x.shape[0],), min(k, x.shape[1])) for s, x in w.items()})


def compare(w: dict[float, Tensor], alpha: float) -> Compared:
    """DIPR at ``alpha`` against top-k."""
    dipr = choose(f"DIPR {alpha:g}", w, {s: (x >= alpha * x[:, :1]).sum(-1) for s, x in w.items()})
    low, high = 1, next(iter(w.values())).shape[1]
    while low < high:  # the smallest k with as much mass
        middle = (low + high) // 2
        low, high = (low, middle) if top_k(w, middle).mass >= dipr.mass else (middle + 1, high)
    return Compared(alpha, dipr, top_k(w, max(1, round(dipr.tokens))), top_k(w, low))


def table(found: list[Compared], tokens: int) -> Table:
    """What was found, for people."""
    shown = (SPREADS[0], SPREADS[3], SPREADS[-1])
    made = Table(title=f"{tokens:,} keys, heads of spread {', '.join(f'{s:g}' for s in SPREADS)}", title_justify="left")
    for name in ("chosen by", "tokens", "mass", "least", *(f"mass at {s:g}" for s in shown)):
        made.add_column(name, justify="right")
    for each in found:
        for choice in (each.dipr, each.same_tokens, each.same_mass):
            masses = (choice.mass, choice.least, *(choice.by_head[s][1] for s in shown))
            made.add_row(choice.name, f"{choice.tokens:,.0f}", *(f"{mass:.3f}" for mass in masses))
        made.add_section()
    return made


def command(
    tokens: Annotated[int, typer.Option(help="Keys of a head.")] = 131_072,
    queries: Annotated[int, typer.Option(help="Queries of each head.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to a file.")] = None,
) -> None:
    """DIPR against top-k on heads of mixed sharpness. Example: alaya-tiers bench choice --tokens 32768"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        if min(tokens, queries) < 1:
            raise ConfigError("--tokens and --queries must be positive")
    with errors.status("weights of all heads"):
        w = weights(tokens, queries)
    found = [compare(w, alpha) for alpha in ALPHAS]
    Console(file=sys.stdout).print(table(found, tokens))
    if json_file is not None:
        facts: dict[str, Any] = {"benchmark": "choice", "machine": machine.describe(), "tokens": tokens}
        json_file.write_text(json.dumps(facts | {"found": [asdict(each) for each in found]}, indent=1) + "\n")
