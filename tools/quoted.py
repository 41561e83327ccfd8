"""The quotation model at any length: its keys and values in linear time, its continuations by sparse attention.

A text is read by `text_key_values`, which is windowed: O(tokens), where a prefill is O(tokens^2). Its keys and values
go through the tiers, most of them to SSD. Full attention answers a question in one forward of all its tokens, which
reads everything once; sparse attention in single steps, told the true token after each. Both use forks of one cache.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from alaya_tiers.config import format_bytes
from alaya_tiers.hf import AlayaCache
from alaya_tiers.stats import SparseUse, TierUse
from alaya_tiers.tools.corpus import CorpusError, Passage, WordTokenizer, passages, read_text, split, stdlib_text
from alaya_tiers.tools.demo import PROMPT_TOKENS, SLOTS, STDLIB_BYTES_PER_TOKEN, Memory
from alaya_tiers.tools.quotation import HEAD_DIM, build_model, fill

Say = Callable[[str], None]

TOKEN_BYTES = 2 * 2 * HEAD_DIM * 4
"""KV of a token: two layers, keys and values, float32."""

ANSWER_TOKENS = 12
EVERYTHING = 1e-30
"""An alpha that every key reaches: then most_selected alone limits the choice."""

ALWAYS: dict[str, Any] = {"mode": "sparse", "look_seconds": 1e-9}
"""Heads look at every length, also where reading everything is faster: what is asked is what they find."""

DENSE_TOKENS = 32_768
"""Up to so many tokens DynamicCache is asked too."""


@dataclass(slots=True)
class Continued:
    """Continuations by one way to choose keys.

    right: of the continuations that full attention gets right. seconds: median of a single step.
    """

    way: str
    right: int
    seconds: float
    read_bytes: float
    """From ssd, of a single step."""
    use: dict[str, Any]

    @property
    def beyond(self) -> float:
        """Keys attended beyond the window, of a query."""
        return float(self.use["attended_tokens"] - self.use["window_tokens"])


@dataclass(slots=True)
class Quoted:
    """One length. full: continuations full attention gets right, of ``asked``; dense: of DynamicCache, None: not asked.

    resident_bytes: of the process, at most, beyond what it was with the model before.
    """

    tokens: int
    source: str
    vocabulary: int
    kv_bytes: int
    read_seconds: float = 0.0
    asked: int = 0
    full: int = 0
    full_seconds: float = 0.0
    dense: int | None = None
    ways: list[Continued] = field(default_factory=list)
    tiers: dict[str, TierUse] = field(default_factory=dict)
    resident_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@torch.no_grad()
def run(tokens: int, alphas: Sequence[float], count: int, text: Path | None, say: Say) -> Quoted:
    """Everything at one length, ``count`` continuations. Raises CorpusError, StoreError."""
    say(f"{tokens:,} words: preparing")
    whole, source = text_of(text, tokens)
    tokenizer = WordTokenizer.fit(whole)
    ids = tokenizer.encode(whole)
    questions = passages(ids, count, PROMPT_TOKENS, ANSWER_TOKENS, suffix=SLOTS).items
    model: Any = build_model(tokenizer.vocabulary_size, slots=SLOTS)
    found = Quoted(tokens, source, tokenizer.vocabulary_size, tokens * TOKEN_BYTES, asked=len(questions))
    if tokens <= DENSE_TOKENS:
        found.dense = sum(_all_at_once(model, dense(model, ids), q) for q in questions)
    budgets = {"device_budget": max(4 << 20, found.kv_bytes // 16), "host_budget": max(4 << 20, found.kv_bytes // 8)}
    with Memory() as memory, AlayaCache.for_model(model, **ALWAYS, **budgets) as cache:
        began = time.perf_counter()
        fill(model, cache, ids, lambda done: say(f"{tokens:,} words: read {done:,}"))
        cache.build_index(lambda done, of: say(f"{tokens:,} words: index {done:,} of {of:,}"))
        found.read_seconds = time.perf_counter() - began
        kept, began = [], time.perf_counter()
        for number, question in enumerate(questions):
            say(f"{tokens:,} words: full attention, question {number + 1}")
            if _all_at_once(model, cache, question):
                kept.append(question)
        found.full, found.full_seconds = len(kept), (time.perf_counter() - began) / len(questions)
        for alpha in alphas:
            say(f"{tokens:,} words: alpha {alpha:g}")
            found.ways.append(_continued(model, cache, f"DIPR {alpha:g}", kept, alpha=alpha))
            k = max(1, round(found.ways[-1].beyond))
            found.ways.append(_continued(model, cache, f"top-{k}", kept, alpha=EVERYTHING, most_selected=k))
        found.tiers = cache.stats().tiers
    found.resident_bytes = memory.peak - memory.start
    return found


def text_of(path: Path | None, tokens: int) -> tuple[str, str]:
    """Exactly so many words. Raises CorpusError if there are fewer."""
    if path is None:
        whole, source = stdlib_text(STDLIB_BYTES_PER_TOKEN * tokens), "Python's standard library"
    else:
        whole, source = read_text(path), path.name
    words = list(islice(split(whole), tokens))
    if len(words) < tokens:
        raise CorpusError(f"{source} has {len(words):,} words, fewer than {tokens:,}: give a longer text")
    return "".join(words), source


def dense(model: Any, ids: Sequence[int]) -> DynamicCache:
    """The same in memory."""
    cache = DynamicCache(config=model.config)
    fill(model, cache, ids)
    return cache


def _all_at_once(model: Any, cache: DynamicCache, question: Passage) -> bool:
    """Whether full attention gives the answer: all tokens in one forward, more rows than sparse attention takes."""
    fork, tokens = copy.deepcopy(cache), torch.tensor([*question.prompt, *question.answer])
    logits = model(input_ids=tokens[None, :-1], past_key_values=fork, logits_to_keep=len(question.answer)).logits[0]
    fork.reset()  # type: ignore[no-untyped-call] # a fork is part of a reference cycle: give its blocks back now
    found: list[int] = logits.argmax(-1).tolist()
    return found == list(question.answer)


def _continued(model: Any, cache: AlayaCache, name: str, questions: Sequence[Passage], **chosen_by: Any) -> Continued:
    """Answers in single steps; true mass and error are measured where the first token of the answer is told."""
    engine, right, read, times = cache.session.engine, 0, 0, list[float]()
    engine.sparse = use = SparseUse()
    settings = engine.settings
    chosen = settings.replace(**chosen_by)
    measured = chosen.replace(measure_mass=True)
    for question in questions:
        fork, tokens, told = copy.deepcopy(cache), [*question.prompt, *question.answer], list[int]()
        for place, token in enumerate(tokens[:-1]):
            first = place + 1 == len(question.prompt)
            engine.settings = measured if first else chosen
            began, before = time.perf_counter(), cache.stats().read_bytes
            logits: Tensor = model(input_ids=torch.tensor([[token]]), past_key_values=fork).logits[0, -1]
            if not first:
                times.append(time.perf_counter() - began)
                read += cache.stats().read_bytes - before
            if place + 1 >= len(question.prompt):
                told.append(int(logits.argmax()))
        fork.reset()
        right += tuple(told) == question.answer
    engine.settings = settings
    middle = sorted(times)[len(times) // 2] if times else 0.0
    return Continued(name, right, middle, read / max(1, len(times)), use.as_dict())


def table(found: Quoted) -> Table:
    """One length, for people."""
    dense = "" if found.dense is None else f", {found.dense} by DynamicCache"
    title = (
        f"quotations from {found.tokens:,} words of {found.source} ({found.vocabulary:,} different), "
        f"{format_bytes(found.kv_bytes)} of KV: {found.full} of {found.asked} right by full attention{dense}"
    )
    made = Table(title=title, title_justify="left")
    made.add_column("attended by")
    for name in ("right", "ms a step", "SSD a step", "beyond window", "of all", "mass", "least", "error"):
        made.add_column(name, justify="right")
    for way in found.ways:
        use = way.use
        shown = [f"{way.beyond:,.1f}", f"{use['attended_share']:.2%}"]
        shown += [f"{use[name]:.3f}" for name in ("true_recovered_mass", "true_least_recovered_mass", "output_error")]
        step = [f"{way.seconds * 1e3:.1f}", format_bytes(way.read_bytes)]
        made.add_row(way.way, f"{way.right} of {found.full}", *step, *shown)
    tiers = (f"{name} {format_bytes(use.peak)}{_of(use.budget)}" for name, use in found.tiers.items())
    made.caption_justify = "left"
    made.caption = (
        f"Read in {found.read_seconds:,.0f} s, with its index; full attention {found.full_seconds:.1f} s a question. "
        f"Peaks: {', '.join(tiers)}; the process {format_bytes(found.resident_bytes)} beyond model and text."
    )
    return made


def _of(budget: int | None) -> str:
    return "" if budget is None else f" of {format_bytes(budget)}"
