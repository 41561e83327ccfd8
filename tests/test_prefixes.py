"""The longest stored prefix is what comparing with everything finds, and is found by reading little."""

import errno
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alaya_tiers.damage import Place
from alaya_tiers.engine import Engine
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.identity import Tokens, common, segment_name
from alaya_tiers.manifest import Entry, LayerBlocks, Manifest, Segment
from alaya_tiers.prefixes import Prefixes
from alaya_tiers.siblings import Siblings
from alaya_tiers.snapshot import Shelf
from tests.test_crash import WHO

SIZE, BLOCK = WHO.segment_tokens, WHO.block_tokens
ROOT = WHO.root()
FOLDER = "session-00000000/s0000-{:05d}/layer_000"


class Records:
    """A shelf of records in memory: what the lookup sees of a store. read: the names of those that were read."""

    path = "/store"

    def __init__(self) -> None:
        self.manifest, self.records = Manifest(1, {ROOT: WHO}), dict[str, Segment]()
        self.read, self.torn = list[str](), set[str]()

    def record(self, name: str) -> Segment:
        self.read.append(name)
        if name in self.torn:
            raise StoreCorrupt(errno.EIO, "torn", "/store/record")
        return self.records[name]

    def expect(self, names: list[str]) -> None:
        """They are in memory."""
        assert set(names) <= self.records.keys()

    def prefixes(self) -> Prefixes:
        return Prefixes(cast(Engine, SimpleNamespace(started=False)), cast(Shelf, self))

    def store(self, prefixes: Prefixes, text: list[int]) -> None:
        """As Contexts does: the records of what is new, then a manifest that has them."""
        before, new = ROOT, dict[str, Segment]()
        for start in range(0, len(text), SIZE):
            tokens = np.array(text[start : start + SIZE])
            runs = -(-tokens.size // BLOCK)
            files, where = (FOLDER.format(len(self.records) + len(new)),), np.zeros(runs, np.int64)
            layer = LayerBlocks(1, 1, 1, "float32", BLOCK, files, where, np.zeros((1, runs), np.uint64))
            new[segment_name(before, tokens)] = Segment(before, start, tokens, {0: layer})
            before = segment_name(before, tokens)
        new = {n: s for n, s in new.items() if n not in self.manifest.segments}
        entries = {n: Entry(s.before, s.start, s.tokens.size, "", s.files) for n, s in new.items()}
        after = prefixes.arranged({n: s.tokens for n, s in new.items()}, entries)
        entries |= self.manifest.segments
        ordered = {n: entries[n] for siblings in after.values() for n in siblings}
        self.records |= new
        self.manifest = Manifest(self.manifest.generation + 1, {ROOT: WHO}, ordered, ordered=True)
        prefixes.stored(new, after)

    def delete(self, prefixes: Prefixes, name: str) -> None:
        """A segment, and all that follow it."""
        gone, entries = {name}, self.manifest.segments
        while more := {n for n, e in entries.items() if e.before in gone} - gone:
            gone |= more
        left = {n: e for n, e in entries.items() if n not in gone}
        self.manifest = Manifest(self.manifest.generation + 1, {ROOT: WHO}, left, ordered=True)
        for one in gone:
            prefixes.forget(one, entries[one].before)


def naive(shelf: Records, prefixes: Prefixes, tokens: Tokens) -> tuple[int, set[str]]:
    """How many tokens can be reused, and what damage is in the way: every segment is compared."""
    at, before = 0, ROOT
    while True:
        wanted, left = dict[str, int](), dict[str, int]()
        for name in shelf.manifest.following().get(before, []):
            record, rest = shelf.records[name], tokens[at:]
            wanted[name] = common(record.tokens, rest)
            if name in shelf.torn and wanted[name] < record.tokens.size:
                wanted[name] = 0  # only its name is known
            left[name] = min(wanted[name], prefixes.usable(name))
        best = max(left, key=lambda n: left[n], default="")
        gained = left.get(best, 0)
        if hurt := {n for n, length in wanted.items() if length > gained}:
            return at + gained, hurt
        at, before = at + gained, best
        if gained < SIZE:
            return at, set()


TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=3 * SIZE) | st.lists(st.just(1), min_size=1, max_size=3 * SIZE)


@pytest.mark.slow
@given(st.lists(TEXT, max_size=12), st.lists(TEXT, min_size=1, max_size=6), st.data())
def test_it_is_what_comparing_with_everything_finds(
    texts: list[list[int]], prompts: list[list[int]], data: Any
) -> None:
    """Whatever was stored, deleted, opened again and damaged in between."""
    shelf = Records()
    prefixes = shelf.prefixes()
    for text in texts:
        shelf.store(prefixes, text)
        match data.draw(st.integers(0, 9)):
            case 0:
                prefixes = shelf.prefixes()
            case 1:
                shelf.delete(prefixes, data.draw(st.sampled_from(sorted(shelf.manifest.segments))))
            case 2:
                shelf.manifest = Manifest(9, {ROOT: WHO}, dict(sorted(shelf.manifest.segments.items())))
                prefixes = shelf.prefixes()
            case 3:
                shelf.torn.add(data.draw(st.sampled_from(sorted(shelf.records))))
                prefixes = shelf.prefixes()
            case 4:
                file = data.draw(st.sampled_from(sorted(s.files[0] for s in shelf.records.values())))
                prefixes._damaged.add(Place(file, data.draw(st.integers(0, SIZE // BLOCK - 1))))
    for prompt in [*prompts, *texts]:
        tokens = np.array(prompt)
        names, length, hurt = prefixes.match(ROOT, tokens)
        assert (length, set(hurt)) == naive(shelf, prefixes, tokens)
        held = np.concatenate([np.empty(0, np.int64), *(shelf.records[n].tokens for n in names)])
        assert common(held, tokens) >= length
        assert len(names) == -(-length // SIZE)


def test_a_lookup_reads_a_few_records_however_many_there_are() -> None:
    """All of them begin alike, and are shorter than a segment: neither hashes nor first tokens tell them apart."""
    shelf, rng = Records(), np.random.default_rng(0)
    prefixes = shelf.prefixes()
    for _ in range(500):
        shelf.store(prefixes, [7] * 6 + rng.integers(0, 50, 6).tolist())
    prefixes = shelf.prefixes()
    for _ in range(20):
        shelf.read.clear()
        tokens = np.array([7] * 6 + rng.integers(0, 50, 9).tolist())
        assert prefixes.match(ROOT, tokens)[1] == naive(shelf, prefixes, tokens)[0]
    shelf.read.clear()
    prefixes = shelf.prefixes()
    prefixes.match(ROOT, tokens)
    assert len(shelf.read) < 16, "500 begin like this one"


def test_records_are_let_go_of_when_there_are_many(monkeypatch: Any) -> None:
    shelf = Records()
    prefixes = shelf.prefixes()
    for n in range(50):
        shelf.store(prefixes, [n] * SIZE)
    monkeypatch.setattr("alaya_tiers.prefixes.MOST_RECORDS", 10 * shelf.records[min(shelf.records)].nbytes)
    prefixes = shelf.prefixes()
    for n in range(50):
        assert prefixes.match(ROOT, np.array([n] * SIZE))[1] == SIZE
    assert len(prefixes._records) <= 11
    assert prefixes._record_bytes == sum(s.nbytes for s in prefixes._records.values())


def test_names_in_a_wrong_order_make_it_find_less_and_nothing_wrong() -> None:
    texts = {str(n): np.array([n // 4, n % 4]) for n in range(16)}
    siblings = Siblings(sorted(texts, reverse=True), texts.__getitem__)
    for n in range(16):
        for name, same in siblings.nearest(texts[str(n)]):
            assert same == common(texts[name], texts[str(n)])
