"""``alaya-tiers bench overhead``: what the integration itself costs, where nothing has to move.

A short prompt, everything in memory: ``generate`` with DynamicCache and with ours, by turns, so that a noisy minute
hits both. What counts is the median of the ratios of neighbours.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.tools import machine
from alaya_tiers.tools.baselines import VOCABULARY, Shape, build_model
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.reporting import JsonFile, one_line_errors, show

GOAL = 1.05
"""``generate`` with a tiered cache may take this many times as long as with DynamicCache."""

REFERENCE = "DynamicCache, sdpa"
OURS = "AlayaCache, alaya"
WAYS = (REFERENCE, OURS, "AlayaCache, sdpa")


@dataclass(slots=True)
class Seconds:
    """One way: time of the prefill with the first token, and of each token after it, by round."""

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Overhead:
    """All that was measured."""

    shape: Shape
    prompt: int
    new: int
    machine: dict[str, Any]
    cpu_of_others: float
    ways: dict[str, Seconds]
    same_tokens: bool

    def ratio(self, way: str, part: str = "total") -> float:
        """Median over rounds of a way's seconds over the reference's of the same round."""
        ours, theirs = getattr(self.ways[way], part), getattr(self.ways[REFERENCE], part)
        middle: float = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        return middle

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        ways = {
            name: {
                part: {"seconds": getattr(seconds, part), "ratio": self.ratio(name, part)}
                for part in ("first", "token", "total")
            }
            for name, seconds in self.ways.items()
        }
        facts = {"prompt": self.prompt, "new_tokens": self.new, "same_tokens": self.same_tokens, "goal": GOAL}
        return {"benchmark": "overhead", "machine": self.machine, "cpu_of_others": self.cpu_of_others} | facts | ways


def measure(shape: Shape, prompt: int, new: int, rounds: int) -> Overhead:
    """Run all ways ``rounds`` times by turns, after a round that does not count."""
    model: Any = build_model(shape, prompt + new + 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(0, VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(2))
    ways = {name: Seconds() for name in WAYS}
    outputs: list[Tensor] = []
    began = CpuUse.now()
    for number in range(rounds + 1):
        for name, seconds in ways.items():
            first, total, output = _generate(model, name, ids, new)
            outputs.append(output)
            if number:
                seconds.first.append(first)
                seconds.total.append(total)
                seconds.token.append((total - first) / max(1, new - 1))
    same = all(torch.equal(output, outputs[0]) for output in outputs)
    return Overhead(shape, prompt, new, machine.describe(), CpuUse.now().others_since(began), ways, same)


class _Watch:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self.puts, self.first = 0, 0.0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def _generate(model: PreTrainedModel, way: str, ids: Tensor, new: int) -> tuple[float, float, Tensor]:
    model.set_attn_implementation("alaya" if way == OURS else "sdpa")
    cache: Cache = DynamicCache(config=model.config) if way == REFERENCE else AlayaCache(config=model.config)
    watch, began = _Watch(), time.perf_counter()
    output: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        streamer=watch,
    )
    ended = time.perf_counter()
    if isinstance(cache, AlayaCache):
        cache.close()
    return watch.first - began, ended - began, output


def table(found: Overhead) -> Table:
    """What was found, for people."""
    m = found.machine
    made = Table(title=f"{found.prompt:,} tokens of prompt, {found.new} new, nothing spilled", title_justify="left")
    made.add_column("way")
    for name in ("prefill ms", "ms a token", "all ms", "prefill x", "token x", "all x"):
        made.add_column(name, justify="right")
    for name, seconds in found.ways.items():
        parts = ("first", "token", "total")
        ms = (f"{statistics.median(getattr(seconds, part)) * 1e3:.1f}" for part in parts)
        made.add_row(name, *ms, *(f"{found.ratio(name, part):.3f}" for part in parts))
    verdict = "PASS" if found.ratio(OURS) <= GOAL else "above"
    made.caption_justify = "left"
    made.caption = (
        f"{OURS}: {found.ratio(OURS):.3f} of {REFERENCE}, goal {GOAL}: {verdict}; tokens "
        f"{'identical' if found.same_tokens else 'DIFFER'}. {m['cpu']}, {m['cores']} cores, torch {m['torch']}, "
        f"transformers {m['transformers']}; others took {found.cpu_of_others:.0%} of the cores."
    )
    return made


def command(
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1024,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often each way runs.")] = 9,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    layers: int = 16,
    hidden: int = 1024,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    json_file: JsonFile = None,
) -> None:
    """Cost of the integration with a short context, against DynamicCache. Example: alaya-tiers bench overhead"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        if min(prompt, rounds) < 1 or new < 2:
            raise ConfigError("--prompt and --rounds must be positive, --new at least 2")
        shape = Shape(layers, hidden, heads, kv_heads, head_dim, dtype)
    with errors.status(f"{rounds + 1} rounds of {len(WAYS)} ways"):
        found = measure(shape, prompt, new, rounds)
    show([table(found)], found.as_dict(), json_file)
