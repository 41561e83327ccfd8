"""The ways from a stored context to its first token, each timed and told apart: see ``bench ttft``."""

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from alaya_tiers.cache import Session
from alaya_tiers.hf.db import DB
from alaya_tiers.parts import Chunk, Say
from alaya_tiers.tools import rawdisk
from alaya_tiers.tools.spans import FORWARD, READ, SESSION, STEP, Span, Split, Timeline
from alaya_tiers.tools.subjects import Question, Subject

OPEN, COLD, EXACT, WHOLE = "sparse, store open", "sparse", "exact", "load whole"
WAYS = (OPEN, COLD, EXACT, WHOLE)

DEVICE, LEAST_HOST, OF_KV = 64 << 20, 64 << 20, 4
"""Budgets: the device tier's, and the least of the host tier, which else is this part of the KV."""

_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"
"""Has transformers not copy keys and values for every query head where there is a mask: sdpa on the CPU needs none."""


@dataclass(slots=True)
class Way:
    """One way to the first token. Seconds of each round and what they were, and bytes of KV read from disk in one.

    right: rounds whose first token was the right one; None where none is known.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    read_bytes: int = 0
    right: int | None = None

    @property
    def median(self) -> float:
        """Seconds, of the rounds."""
        return statistics.median(self.seconds)

    @property
    def split(self) -> Split:
        """Of the round in the middle."""
        return sorted(self.splits, key=lambda split: split.total)[len(self.splits) // 2]


@dataclass(frozen=True, slots=True)
class Stored:
    """A subject whose context lies in a database, and beside it as it lies in memory, a file for each layer."""

    subject: Subject
    path: Path

    def whole(self, layer: int) -> Path:
        """Keys and values of a layer: [2, kv_heads, tokens, head_dim], nothing else."""
        return self.path.with_name(f"{self.path.name}-whole-{layer}")

    @property
    def index_bytes(self) -> int:
        """Of the codes in the database."""
        return sum(file.stat().st_size for file in self.path.glob("segments/*/index"))

    def empty_cache(self) -> None:
        """Nothing of it is in the page cache."""
        rawdisk.empty_cache([*self.path.rglob("*"), *self.path.parent.glob(f"{self.path.name}-whole-*")])

    def database(self, way: str) -> DB:
        """Opened with a quarter of the KV as its host budget. Raises StoreError."""
        sparse = {"mode": "sparse", "index_budget": None} | dict(self.subject.settings)
        return DB(
            self.path, model=self.subject.model, device_budget=DEVICE,
            host_budget=max(LEAST_HOST, self.subject.kv_bytes // OF_KV), **({} if way == EXACT else sparse),
        )  # fmt: skip

    def write(self, say: Say) -> None:
        """Import it, and write the files. Raises StoreError, OSError."""
        with self.database(COLD) as db:
            db.import_context(self.subject.ids, self._both(), say=say)

    def remove(self) -> None:
        """All of it from the disk."""
        shutil.rmtree(self.path)
        for file in self.path.parent.glob(f"{self.path.name}-whole-*"):
            file.unlink()

    def _both(self) -> Iterator[Chunk]:
        subject, start = self.subject, 0
        *shape, dim = subject.layer_shape
        files: list[npt.NDArray[np.uint8]] = [
            np.memmap(self.whole(layer), np.uint8, "w+", shape=(*shape, dim * subject.model.dtype.itemsize))
            for layer in range(subject.model.config.num_hidden_layers)
        ]
        for chunk in subject.chunks():
            n = chunk[0][0].shape[2]
            for file, kv in zip(files, chunk, strict=True):
                for out, part in zip(file, kv, strict=True):
                    out[:, start : start + n] = part[0].contiguous().view(torch.uint8).numpy()
            start += n
            yield chunk


@torch.no_grad()
def ask(way: Way, stored: Stored, question: Question, before: Question) -> None:
    """One round: the first token after the context and a question, from nothing but what the way has open.

    before: what was asked of the open store already. Raises StoreError, OSError.
    """
    timeline = Timeline()
    stored.empty_cache()
    if way.name == WHOLE:
        began, end, logits = _load_whole(way, stored, question, timeline)
    elif way.name == OPEN:
        began, end, logits = _open_store(way, stored, question, before, timeline)
    else:
        began, end, logits = _closed_store(way, stored, question, timeline)
    way.splits.append(timeline.split(Span(STEP, FORWARD, began, end)))
    way.seconds.append(way.splits[-1].total)
    if question.answer is not None:
        way.right = (way.right or 0) + int(int(logits[0, -1].argmax()) == question.answer)


Asked = tuple[float, float, Tensor]
"""When it began, when there was a first token, and its logits."""


def _closed_store(way: Way, stored: Stored, question: Question, timeline: Timeline) -> Asked:
    """Open the store, make a session, decode."""
    with timeline.watching():
        began = time.perf_counter()
        with timeline.note(SESSION, partial(stored.database, way.name)) as db:
            end, logits = _first(db, stored.subject, question, timeline)
            way.read_bytes = db.stats().read_bytes
    return began, end, logits


def _open_store(way: Way, stored: Stored, question: Question, before: Question, timeline: Timeline) -> Asked:
    """The same where an earlier session has left its codes in memory, and others have taken the memory of its KV."""
    with stored.database(way.name) as db:
        session, rest = db.create_session(stored.subject.prompt(before))
        stored.subject.model(input_ids=rest, past_key_values=session)
        session.build_index()  # whatever codes have not been asked for
        let_go(session.session)
        session.close()
        stored.empty_cache()
        read = db.stats().read_bytes
        with timeline.watching():
            began = time.perf_counter()
            end, logits = _first(db, stored.subject, question, timeline)
        way.read_bytes = db.stats().read_bytes - read
    return began, end, logits


def _first(db: DB, subject: Subject, question: Question, timeline: Timeline) -> tuple[float, Tensor]:
    session, rest = timeline.note(SESSION, db.create_session, subject.prompt(question))
    logits = subject.model(input_ids=rest, past_key_values=session, logits_to_keep=1).logits
    return time.perf_counter(), logits


def let_go(session: Session) -> None:
    """Nothing of a session's KV that is on disk stays in memory."""
    engine = session.engine
    assert engine.pages is not None
    with engine.mover.lock:
        engine.pages.shrink(engine.mover.host.capacity)
    engine.let_go(np.concatenate([s.ids(row.first).ravel() for s in session.layers.values() for row in s.rows]))


def _load_whole(way: Way, stored: Stored, question: Question, timeline: Timeline) -> Asked:
    """All keys and values from files into a DynamicCache, and the first token with sdpa."""
    subject, (both, heads, tokens, dim) = stored.subject, stored.subject.layer_shape
    way.read_bytes = subject.kv_bytes
    with timeline.watching(), _plain(subject.model):
        began = time.perf_counter()
        cache = DynamicCache(config=subject.model.config)
        for layer in range(subject.model.config.num_hidden_layers):
            data = timeline.note(READ, np.fromfile, stored.whole(layer), np.uint8)
            k, v = torch.from_numpy(data).view(subject.model.dtype).view(both, 1, heads, tokens, dim)
            cache.update(k, v, layer)
        ids = torch.tensor([question.tokens])
        logits = subject.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        return began, time.perf_counter(), logits


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """sdpa at its best."""
    before = os.environ.get(_GQA)
    os.environ[_GQA] = "1"
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("alaya")
        if before is None:
            del os.environ[_GQA]
        else:
            os.environ[_GQA] = before
