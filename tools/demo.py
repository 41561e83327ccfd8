"""The demo as data: a model reads a text through a tiered cache, is asked to continue passages of it, and is checked.

    subject   a model, the text it reads, passages to continue
    plan      the budgets: an eighth of the text's KV in the host tier, little in the device tier
    run       read in chunks (blocks are written behind), then each question on a fork of the cache; then all of it
              again with DynamicCache, in the same process: the tokens must be the same
    report    what came out, as frozen values

Nothing here prints; `alaya_tiers.tools.cli` does.
"""

import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from alaya_tiers.blocks import PAGE, Geometry, round_up
from alaya_tiers.config import parse_bytes
from alaya_tiers.errors import ConfigError, ContextTooLong
from alaya_tiers.hf import AlayaCache
from alaya_tiers.stats import Stats
from alaya_tiers.tools.corpus import Passage, WordTokenizer, passages, read_text, split, stdlib_text
from alaya_tiers.tools.quotation import build_model, fill

TOKENS = 16_384
"""Of the text, by default: with the comparison a minute or two on two cores. Exact prefill is quadratic."""

MODEL_TOKENS = 4096
"""The same for a real model, which computes more for each token."""

COMPARED_TOKENS = 32_768
"""Up to this many tokens DynamicCache answers too, unless told otherwise."""

BLOCK_TOKENS = (256, 128, 64, 32, 16)
SLOTS = 8
PROMPT_TOKENS = 32
HELD_BACK_TOKENS = 16
"""A real model that gets no prompt continues the text from this many tokens before its end."""

STDLIB_BYTES_PER_TOKEN = 16
"""Enough: it has 4 to 5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user can choose. tokens, compare and the budgets: None lets the demo decide."""

    tokens: int | None = None
    text: Path | None = None
    model: str | None = None
    prompt: str | None = None
    questions: int = 8
    answer_tokens: int = 12
    host_budget: str | None = None
    device_budget: str | None = None
    path: Path | None = None
    chunk: int = 512
    compare: bool | None = None
    alpha: float | None = None
    """Sparse attention to the keys with at least this share of the largest weight; None: exact attention."""
    windowed: bool = False
    """Read in linear time: the computed model looks back only a few tokens to make its keys and values."""


class Watcher:
    """Told how far the demo is. This one does nothing with it."""

    def stage(self, name: str, total: int) -> None:
        """Something of ``total`` steps begins."""

    def advance(self, done: int, stats: Stats | None) -> None:
        """``done`` of its steps are done; stats: of the tiered cache, if it is at work."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, the text it reads and the questions. A question without an answer has none that is known."""

    name: str
    source: str
    model: Any
    decode: Callable[[Sequence[int]], str]
    ids: list[int]
    questions: tuple[Passage, ...]


def prepare(options: Options) -> Subject:
    """The model and text that the options ask for. Raises ConfigError, CorpusError, ContextTooLong."""
    if options.windowed and options.model is not None:
        raise ConfigError("only the computed model can be read to in windows: leave out --windowed or --model")
    return quotation_subject(options) if options.model is None else hub_subject(options, options.model)


def source_text(options: Options, tokens: int) -> tuple[str, str]:
    """A text of at least so many tokens, if it has as many, and what to call it."""
    if options.text is None:
        return stdlib_text(STDLIB_BYTES_PER_TOKEN * tokens), "Python's standard library"
    return read_text(options.text), options.text.name


def quotation_subject(options: Options) -> Subject:
    """The computed model, which knows the words of the text and continues any quotation from it."""
    tokens = options.tokens or TOKENS
    text, source = source_text(options, tokens)
    text = "".join(islice(split(text), tokens))
    tokenizer = WordTokenizer.fit(text)
    ids = tokenizer.encode(text)
    if options.prompt is None:
        questions = passages(ids, options.questions, PROMPT_TOKENS, options.answer_tokens, suffix=SLOTS).items
    else:
        questions = (prompted(len(ids), tokenizer.encode(options.prompt)),)
    model = build_model(tokenizer.vocabulary_size, slots=SLOTS)
    return Subject("two-layer quotation model (computed)", source, model, tokenizer.decode, ids, questions)


def hub_subject(options: Options, name: str) -> Subject:
    """A real model with its tokenizer."""
    tokenizer, model = load(name)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    prompt = [] if options.prompt is None else tokenizer(options.prompt, add_special_tokens=False).input_ids
    kept = (len(prompt) or HELD_BACK_TOKENS) + options.answer_tokens
    room = MODEL_TOKENS if limit is None else limit - kept
    tokens = options.tokens or min(MODEL_TOKENS, room)
    if limit is not None and not 0 < tokens <= room:
        raise ContextTooLong(
            f"{name} has {limit} positions: {tokens} tokens of text, the prompt and its continuation do not fit. "
            f"Ask for --tokens {room} or less."
            if room > 0
            else f"{name} has {limit} positions, too few for a prompt and continuation of {kept} tokens."
        )
    text, source = source_text(options, tokens)
    wanted = tokens if prompt else tokens + HELD_BACK_TOKENS
    ids: list[int] = tokenizer(text[: STDLIB_BYTES_PER_TOKEN * wanted]).input_ids[:wanted]
    if not prompt:
        ids, prompt = ids[:-HELD_BACK_TOKENS], ids[-HELD_BACK_TOKENS:]
    if not ids:
        raise ConfigError(f"{source} is too short: no text is left before the prompt")
    return Subject(name, source, model, tokenizer.decode, ids, (prompted(len(ids), prompt),))


def prompted(start: int, prompt: Sequence[int]) -> Passage:
    """A question whose answer is not known."""
    if not prompt:
        raise ConfigError("the prompt is empty")
    return Passage(start, tuple(prompt), ())


def load(name: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Tokenizer and model of a folder or a hub id. Raises ConfigError."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"cannot load the model: there is no folder {name}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return AutoTokenizer.from_pretrained(name), model.eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        why = " ".join(str(error).split(". ")[0].split())
        raise ConfigError(f"cannot load the model {name!r}: {why}. Give a folder or a hub id you can reach.") from error


@dataclass(frozen=True, slots=True)
class Plan:
    """Budgets for a text. kv_bytes: of the text's KV."""

    kv_bytes: int
    device_budget: int
    host_budget: int
    block_tokens: int


def plan(geometries: Sequence[Geometry], tokens: int, options: Options) -> Plan:
    """An eighth of the KV for the host tier, a sixteenth for the device tier if that is enough, in round numbers.

    The device tier must hold the open blocks of the text and of one fork. Blocks are made smaller until that fits.
    """
    kv_bytes = tokens * sum(g.token_bytes for g in geometries)
    for block_tokens in BLOCK_TOKENS:
        run = max(g.kv_heads * round_up(block_tokens * g.row_bytes, PAGE) for g in geometries)
        need = 2 * (len(geometries) + 1) * run
        host = parse_bytes(options.host_budget) if options.host_budget else rounded(kv_bytes // 8, run)
        device = parse_bytes(options.device_budget) if options.device_budget else rounded(kv_bytes // 16, run)
        smaller_wastes = max(block_tokens * g.row_bytes for g in geometries) <= PAGE
        if smaller_wastes or (need <= (device if options.device_budget else kv_bytes // 8) and host >= 4 * run):
            break
    if options.device_budget is None:
        device = max(device, need)
    if options.host_budget is None:
        host = max(host, 2 * run)
    return Plan(kv_bytes, device, host, block_tokens)


def rounded(nbytes: int, unit: int) -> int:
    """Down to whole MiB where there are a few, else to whole units."""
    unit = 1 << 20 if nbytes >= 4 << 20 else unit
    return nbytes // unit * unit


@torch.no_grad()
def full_attention(model: Any, ids: Sequence[int]) -> list[Geometry]:
    """The KV shapes of the layers that will be tiered, from reading a few tokens; also warms the process up."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized]
    if not layers:
        raise ConfigError("the model has no layer with full attention, so there is nothing to tier")
    return [Geometry(x.keys.shape[1], x.keys.shape[3], x.values.shape[3], x.keys.dtype) for x in layers]


class Memory:
    """Watches the resident memory of the process while it is entered. start, peak: bytes."""

    def __init__(self, every_seconds: float = 0.01) -> None:
        self._process, self._every, self._done = psutil.Process(), every_seconds, threading.Event()
        self.start = self.peak = 0

    def __enter__(self) -> Self:
        self.start = self.peak = self._rss()
        self._thread = threading.Thread(target=self._watch, name="memory")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._rss())

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self.peak = max(self.peak, self._rss())

    def _rss(self) -> int:
        return int(self._process.memory_info().rss)


class Stopwatch(BaseStreamer):
    """Notes when each token comes out of `generate`; the first note is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """New tokens; seconds to the first of them, and for all others together."""

    tokens: tuple[int, ...]
    first_seconds: float
    other_seconds: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one cache, in seconds and tokens a second; the time to the first token is the median of all questions."""

    prefill_seconds: float
    prefill_rate: float
    ttft_seconds: float
    decode_rate: float | None

    @classmethod
    def of(cls, tokens: int, prefill_seconds: float, replies: Sequence[Reply]) -> Self:
        """tokens: of the text."""
        others = sum(len(reply.tokens) - 1 for reply in replies)
        seconds = sum(reply.other_seconds for reply in replies)
        return cls(
            prefill_seconds,
            tokens / prefill_seconds,
            statistics.median(reply.first_seconds for reply in replies),
            others / seconds if others and seconds else None,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """What one cache gave. reading, asking: its numbers, if it keeps any, after the text and after the questions."""

    replies: tuple[Reply, ...]
    speed: Speed
    reading: Stats | None
    asking: Stats | None


def run_tiers(subject: Subject, budgets: Plan, options: Options, watcher: Watcher) -> Run:
    """Read the text and answer through the tiers. Raises StoreError, BudgetTooSmall."""
    with AlayaCache.for_model(
        subject.model,
        path=options.path,
        device_budget=budgets.device_budget,
        host_budget=budgets.host_budget,
        block_tokens=budgets.block_tokens,
        **({} if options.alpha is None else {"mode": "sparse", "alpha": options.alpha, "recent_tokens": 128}),
    ) as cache:
        found = read_and_answer(subject, cache, options, watcher)
        if options.path is not None:
            cache.flush()
    return found


def read_and_answer(subject: Subject, cache: DynamicCache, options: Options, watcher: Watcher) -> Run:
    """What any cache is put through."""
    seconds = prefill(subject, cache, options, watcher)
    if isinstance(cache, AlayaCache):
        cache.build_index()  # in sparse mode; what idle time has not done yet
    reading = stats_of(cache)
    replies = answer_all(subject, cache, options.answer_tokens, watcher)
    return Run(replies, Speed.of(len(subject.ids), seconds, replies), reading, stats_of(cache))


@torch.no_grad()
def prefill(subject: Subject, cache: DynamicCache, options: Options, watcher: Watcher) -> float:
    """Read the text into the cache, without the model's head; the seconds it took."""
    watcher.stage("reading" + by(cache), len(subject.ids))
    began = time.perf_counter()
    if options.windowed:
        fill(subject.model, cache, subject.ids, lambda done: watcher.advance(done, stats_of(cache)))
        return time.perf_counter() - began
    for start in range(0, len(subject.ids), options.chunk):
        part = torch.tensor([subject.ids[start : start + options.chunk]])
        subject.model.base_model(input_ids=part, past_key_values=cache, use_cache=True)
        watcher.advance(start + part.shape[1], stats_of(cache))
    return time.perf_counter() - began


def answer_all(subject: Subject, cache: DynamicCache, count: int, watcher: Watcher) -> tuple[Reply, ...]:
    """Continue every passage, each as if it stood behind the text."""
    watcher.stage("answering" + by(cache), len(subject.questions))
    replies = []
    for question in subject.questions:
        fork = copy.deepcopy(cache)  # of an AlayaCache: shares all blocks
        replies.append(answer(subject, question, fork, count))
        fork.reset()  # type: ignore[no-untyped-call] # a fork is part of a reference cycle: give its blocks back now
        watcher.advance(len(replies), stats_of(cache))
    return tuple(replies)


def answer(subject: Subject, question: Passage, cache: DynamicCache, count: int) -> Reply:
    """Greedy continuation of one passage."""
    tokens, watch = torch.tensor([[*subject.ids, *question.prompt]]), Stopwatch()
    began = time.perf_counter()
    out = subject.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=count,
        do_sample=False,
        streamer=watch,
    )
    first, last = watch.times[1], watch.times[-1]
    return Reply(tuple(out[0, tokens.shape[1] :].tolist()), first - began, last - first)


def by(cache: DynamicCache) -> str:
    return "" if isinstance(cache, AlayaCache) else " (DynamicCache)"


def stats_of(cache: DynamicCache) -> Stats | None:
    return cache.stats() if isinstance(cache, AlayaCache) else None


@dataclass(frozen=True, slots=True)
class Answer:
    """A question and what came out. truth: what the text says. identical: to DynamicCache. None = not known."""

    start: int
    prompt: str
    continuation: str
    truth: str | None
    exact: bool | None
    identical: bool | None
    ttft_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the demo found. reading, asking: numbers of the tiered cache after reading the text and after the questions.

    rss: resident memory of the process, with the model, before the tiered cache was made and at most while it worked.
    """

    model: str
    source: str
    tokens: int
    plan: Plan
    answers: tuple[Answer, ...]
    new_tokens: int
    speed: Speed
    reading: Stats
    asking: Stats
    rss_bytes: int
    rss_peak_bytes: int
    dynamic: Speed | None
    not_compared: str | None

    @property
    def exact(self) -> int | None:
        """How many continuations are what the text says; None if that is not known."""
        known = [answer.exact for answer in self.answers if answer.exact is not None]
        return sum(known) if known else None

    @property
    def identical(self) -> int | None:
        """How many continuations are those of DynamicCache; None if it was not asked."""
        return None if self.dynamic is None else sum(bool(answer.identical) for answer in self.answers)

    @property
    def differs(self) -> bool:
        """Whether a token was not that of DynamicCache."""
        return self.identical is not None and self.identical < len(self.answers)

    @property
    def memory_bytes(self) -> int:
        """The most KV that was in memory."""
        return sum(self.asking.tiers[name].peak for name in ("device", "host"))

    @property
    def ssd_bytes_per_token(self) -> float:
        """Read from ssd for each new token."""
        return (self.asking.read_bytes - self.reading.read_bytes) / self.new_tokens

    @property
    def hit_rate(self) -> float:
        """Share of the KV attended to while answering that was in memory when attention asked."""
        before, after = self.reading.touched, self.asking.touched
        total = after.total - before.total
        return 1 - (after.waited - before.waited) / total if total else 1.0


def run(options: Options, watcher: Watcher | None = None) -> Report:
    """The whole demo. Raises AlayaError."""
    watcher = watcher or Watcher()
    watcher.stage("preparing", 1)
    subject = prepare(options)
    geometries = full_attention(subject.model, subject.ids[: options.chunk])
    budgets = plan(geometries, len(subject.ids), options)
    plain_attention = subject.model.config._attn_implementation
    with Memory() as memory:
        tiered = run_tiers(subject, budgets, options, watcher)
    skipped, dynamic = not_compared(options, len(subject.ids)), None
    if skipped is None:
        subject.model.set_attn_implementation(plain_attention)
        dynamic = read_and_answer(subject, DynamicCache(config=subject.model.config), options, watcher)
    assert tiered.reading is not None
    assert tiered.asking is not None
    return Report(
        model=subject.name,
        source=subject.source,
        tokens=len(subject.ids),
        plan=budgets,
        answers=tuple(answers(subject, tiered, dynamic)),
        new_tokens=sum(len(reply.tokens) for reply in tiered.replies),
        speed=tiered.speed,
        reading=tiered.reading,
        asking=tiered.asking,
        rss_bytes=memory.start,
        rss_peak_bytes=memory.peak,
        dynamic=dynamic.speed if dynamic else None,
        not_compared=skipped,
    )


def not_compared(options: Options, tokens: int) -> str | None:
    """Why DynamicCache is not asked; None if it is."""
    if options.compare is None and tokens > COMPARED_TOKENS:
        return f"the text has more than {COMPARED_TOKENS:,} tokens; --compare asks for it"
    return "--no-compare" if options.compare is False else None


def answers(subject: Subject, tiered: Run, dynamic: Run | None) -> Iterator[Answer]:
    """Each question beside the truth and what DynamicCache said."""
    for number, (question, reply) in enumerate(zip(subject.questions, tiered.replies, strict=True)):
        yield Answer(
            question.start,
            subject.decode(question.prompt),
            subject.decode(reply.tokens),
            subject.decode(question.answer) if question.answer else None,
            reply.tokens == question.answer if question.answer else None,
            None if dynamic is None else reply.tokens == dynamic.replies[number].tokens,
            reply.first_seconds,
        )
