"""What may be left of a store after a loss of power: recorded workload by workload, looked at quickly.

Most of an image is the same as in the one before, so whatever was looked at is remembered by its contents. What remains
is opening the store, which is the code that would run: every image is opened, cleaned and closed by it.
"""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from alaya_tiers.config import Settings
from alaya_tiers.errors import AlayaError
from alaya_tiers.manifest import Manifest, Segment
from alaya_tiers.store import Store
from alaya_tiers.verify import verify
from tests.crash import CrashDisk, Image
from tests.test_crash import BLOCK, LAYERS, ROOT, SETTINGS, TEXTS, WHO, Base, kv

Texts = dict[str, list[int]]
"""Token ids by context."""

MODEL = {"some": "model"}
PAGE = 4096


class Acked(NamedTuple):
    """What was acknowledged: contexts that are stored, and names of those that are deleted."""

    known: Texts
    gone: frozenset[str]


class Life:
    """One opening of the store after the other, and what has to be there for certain."""

    def __init__(self, disk: Any, told: Callable[["Acked"], None], settings: Settings = SETTINGS) -> None:
        self.disk, self.told, self.settings = disk, told, settings
        self.known: Texts = {}
        self.gone: frozenset[str] = frozenset()
        self.base = self.open()

    def open(self) -> Base:
        self.base = Base(self.disk, ROOT, settings=self.settings)
        return self.base

    def again(self) -> Base:
        self.base.close()
        return self.open()

    def promised(self, *names: str, tokens: list[int]) -> None:
        """These contexts are stored: they were acknowledged."""
        self.known |= dict.fromkeys(names, tokens)
        self.tell()

    def tell(self) -> None:
        self.told(Acked(dict(self.known), self.gone))

    def store(self, tokens: list[int]) -> str:
        if self.gone:
            self.gone = frozenset()  # it may be one of them
            self.tell()
        name = self.base.store(tokens)
        self.promised(name, tokens=tokens)
        return name

    def delete(self, name: str) -> None:
        """From the moment it is asked for, it may be gone; when it is done, it is."""
        self.known.pop(name)
        self.tell()
        self.base.contexts.delete(name)
        self.gone |= {name}
        self.tell()


def store(life: Life) -> None:
    """Two contexts that part in the middle of a block."""
    for tokens in TEXTS[:2]:
        life.store(tokens)


def append(life: Life) -> None:
    """A conversation that is stored turn by turn, its last block late each time."""
    session, _ = life.base.session(TEXTS[0])
    said = list(TEXTS[0])
    for turn in ([31, 32, 33], [34], list(range(40, 58))):
        if len(said) > len(TEXTS[0]) or turn == [31, 32, 33]:
            (name,) = life.base.contexts.store(session, np.array([said]), WHO)
            life.promised(name, tokens=list(said))
        at = len(said)
        said += turn
        for layer in range(LAYERS):
            k, v = kv(np.array(said), layer)[..., at:, :]
            session.update(layer, k, v)
    (name,) = life.base.contexts.store(session, np.array([said]), WHO)
    life.promised(name, tokens=said)
    session.clear()


def index(life: Life) -> None:
    """An index beside what is stored, made with it and made later."""
    name = life.store(TEXTS[0])
    life.base.contexts.index(name)
    life.again()
    life.base.contexts.index(life.store(TEXTS[3]))


def delete(life: Life) -> None:
    """One of two that share a segment, then the other."""
    names = [life.store(tokens) for tokens in TEXTS[:3]]
    for name in names[:2]:
        life.delete(name)


def fork(life: Life) -> None:
    """Two ways out of one session, the second after a crop."""
    session, _ = life.base.session(TEXTS[0])
    other = {layer: session.fork(layer) for layer in range(LAYERS)}
    (name,) = life.base.contexts.store(session, np.array([TEXTS[0]]), WHO)
    life.promised(name, tokens=TEXTS[0])
    session.clear()
    session.layers.update(other)
    session.crop(18)
    tokens = [*TEXTS[0][:18], 71, 72]
    for layer in range(LAYERS):
        k, v = kv(np.array(tokens), layer)[..., 18:, :]
        session.update(layer, k, v)
    (name,) = life.base.contexts.store(session, np.array([tokens]), WHO)
    life.promised(name, tokens=tokens)
    session.clear()


def load(life: Life) -> None:
    """An import in chunks, the second of which goes on from the first."""
    for tokens in (TEXTS[0], TEXTS[3]):
        ids = np.array(tokens)
        parts = [range(at, min(at + 9, ids.size)) for at in range(0, ids.size, 9)]
        every = [kv(ids, layer) for layer in range(LAYERS)]
        chunks = [[(k[:, :, p.start : p.stop], v[:, :, p.start : p.stop]) for k, v in every] for p in parts]
        life.promised(life.base.contexts.load(ids, chunks, WHO), tokens=tokens)


def rows(life: Life) -> None:
    """Two sequences of one session, which begin alike."""
    session = life.base.contexts.open([[]], 0, None, torch.device("cpu"))
    texts = [list(range(1, 26)), [*range(1, 20), 60, 61, 62, 63, 64, 65]]
    for layer in range(LAYERS):
        both = [kv(np.array(tokens), layer) for tokens in texts]
        session.update(layer, *(torch.cat([one[n] for one in both]) for n in range(2)))
    names = life.base.contexts.store(session, np.array(texts), WHO)
    life.known |= dict(zip(names, texts, strict=True))
    life.tell()
    session.clear()


def demote(life: Life) -> None:
    """More than all tiers in memory hold, so that blocks are written long before they are stored."""
    life.store([n % 90 for n in range(70)])


def reopen(life: Life) -> None:
    """Openings in between, each of which cleans up."""
    life.store(TEXTS[2])
    life.again()
    life.delete(life.store(TEXTS[0]))
    life.again()
    life.store(TEXTS[1])


def lend(life: Life) -> None:
    """Deleted while a reader has it, stored again, and deleted for good."""
    name = life.store(TEXTS[0])
    reader = Base(life.disk, ROOT, read_only=True)
    life.delete(name)
    life.store(TEXTS[2])
    assert life.store(TEXTS[0]) == name
    reader.close()
    life.delete(name)
    life.base.contexts.collect()


def abandon(life: Life) -> None:
    """A session that is never stored, beside one that is, and a cancelled import."""
    session, _ = life.base.session(TEXTS[0])
    life.store(TEXTS[2])
    session.clear()

    def chunks() -> Any:
        yield [tuple(kv(np.array(TEXTS[1]), layer)[..., :9, :]) for layer in range(LAYERS)]
        raise KeyboardInterrupt

    try:
        life.base.contexts.load(np.array(TEXTS[1]), chunks(), WHO)
    except KeyboardInterrupt:
        life.store(TEXTS[3])


SPARSE = SETTINGS.replace(mode="sparse", index_budget="1MiB", sink_tokens=BLOCK, recent_tokens=BLOCK)
WORKLOADS: dict[str, tuple[Callable[[Life], None], Settings]] = {
    work.__name__: (work, SPARSE if work is index else SETTINGS)
    for work in (store, append, index, delete, fork, load, rows, demote, reopen, lend, abandon)
}


class Recorder:
    """Images after every operation, each with what had been acknowledged then; the same image only once."""

    def __init__(self, images: int, seed: int = 0) -> None:
        self.rng, self.images = random.Random(seed), images
        self.acked = Acked({}, frozenset())
        self.found: dict[int, tuple[Acked, Image]] = {}
        self.texts: set[tuple[int, ...]] = set()
        self.operations = 0

    def __call__(self, disk: CrashDisk) -> None:
        self.operations += 1
        for share in (0.0, 1.0, *(self.rng.choice((0.2, 0.5, 0.8)) for _ in range(self.images))):
            image = disk.image(self.rng, share)
            key = hash((frozenset(image.items()), tuple(self.acked.known), self.acked.gone))
            self.found.setdefault(key, (self.acked, image))

    def acknowledge(self, acked: Acked) -> None:
        self.acked = acked
        self.texts |= {tuple(tokens) for tokens in acked.known.values()}


def record(name: str, images: int, skip: int | None = None, seed: int = 0) -> tuple[Recorder, CrashDisk]:
    """A workload on a disk without one of its barriers."""
    disk, recorder = CrashDisk(skip=skip), Recorder(images, seed)
    disk._folder(ROOT)
    disk.root.sync()  # the directory itself is the user's
    disk.after_each = lambda disk: recorder(disk) if skip is None or len(disk.barriers) > skip else None
    work, settings = WORKLOADS[name]

    def told(acked: Acked) -> None:
        recorder.acknowledge(acked)
        disk.after_each(disk)

    life = Life(disk, told, settings)
    work(life)
    life.base.close()
    disk.after_each = lambda _: None
    return recorder, disk


class Surveyor:
    """Opens images and compares every byte of what is in them; what it saw once it does not compare again."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, bytes], Segment] = {}
        self._whole: set[tuple[object, ...]] = set()
        self._json: set[bytes] = set()
        self._kv: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}

    def survey(self, image: Image) -> Texts:
        """What a new opening finds; AssertionError where something is not whole."""
        disk = CrashDisk(image)
        try:
            opened = Store(ROOT, MODEL, disk)
        except AlayaError as error:
            raise AssertionError(f"it does not open: {error!r}") from error
        manifest, found = opened.manifest, dict[str, list[int]]()
        for name in manifest.contexts:
            chain = [self._segment(opened, part) for part in manifest.chain(name)]
            found[name] = np.concatenate([segment.tokens for segment in chain]).tolist()
            for segment in chain:
                self._compare(disk, manifest, segment, found[name])
        opened.close()
        self._tidy(disk, manifest)
        return found

    def _segment(self, opened: Store, name: str) -> Segment:
        path = f"{ROOT}/segments/{name}/zarr.json"
        found = (
            opened.disk.fetch(path, 1 << 30) if "zarr.json" in opened.disk.names(path[: -len("/zarr.json")]) else b""
        )
        key = (opened.manifest.segments[name].digest, found)
        if key not in self._records:
            try:
                self._records[key] = opened.record(name)
            except AlayaError as error:
                raise AssertionError(f"what is listed cannot be read: {error!r}") from error
        return self._records[key]

    def _compare(self, disk: CrashDisk, manifest: Manifest, segment: Segment, tokens: list[int]) -> None:
        """Token for token, and as ``verify`` sees it."""
        names = [f"{ROOT}/{folder}/{end}" for folder in segment.files for end in ("zarr.json", "c/0/0/0")]
        data = [disk.contents(name) for name in names]
        key = (segment.name, id(segment), *data)
        if key in self._whole:
            return
        damage = [one for one in verify(disk, ROOT, manifest, lambda done, of: None) if one.kind != "index"]
        assert not damage, f"{len(damage)} damages, the first {damage[0]}"
        end, shards = segment.start + segment.tokens.size, dict(zip(names, data, strict=True))
        for number, layer in segment.layers.items():
            both = self._expected(tokens[:end], number)
            for run, where in enumerate(layer.where.tolist()):
                raw = shards[f"{ROOT}/{layer.files[where]}/c/0/0/0"]
                assert raw is not None
                block = np.frombuffer(raw, np.float32, BLOCK * 16, run * PAGE).reshape(BLOCK, 16)
                start = segment.start + run * BLOCK
                mine = both[start : min(start + BLOCK, end)]
                assert np.array_equal(block[: len(mine)], mine), "other keys or values"
        self._whole.add(key)

    def _expected(self, tokens: list[int], layer: int) -> Any:
        """[tokens, k and v]"""
        key = (tuple(tokens), layer)
        if key not in self._kv:
            k, v = kv(np.array(tokens), layer)
            self._kv[key] = torch.cat([k[0, 0], v[0, 0]], -1)
        return self._kv[key].numpy()

    def _tidy(self, disk: CrashDisk, manifest: Manifest) -> None:
        """Nothing is left that nothing names, and any Zarr reader gets through to what is."""
        left = disk.image(random.Random(0), 1)
        arrays = {path.removesuffix("/c/0/0/0").removeprefix(f"{ROOT}/") for path in left if path.endswith("/c/0/0/0")}
        assert arrays == set(manifest.files), "files that nothing names were left, or some are missing"
        assert not [path for path in left if path.endswith((".partial", "probe"))]
        if manifest.generation:
            for folder in {f for path in left if path.endswith("/zarr.json") for f in _folders(path)}:
                self._node(left.get(f"{folder}/zarr.json"))

    def _node(self, data: bytes | None) -> None:
        assert data is not None, "a group without metadata"
        if data not in self._json:
            try:
                assert json.loads(data)["node_type"] in ("group", "array")
            except ValueError:
                raise AssertionError("torn metadata") from None
            self._json.add(data)


@functools.cache
def _folders(path: str) -> tuple[str, ...]:
    """Those that a file of the store is in, the store's own the last."""
    return tuple(str(f) for f in Path(path).parents if f.is_relative_to(ROOT))


def violations(recorder: Recorder, surveyor: Surveyor, most: int | None = None) -> list[str]:
    """Every image in which what was acknowledged is not whole, or something else is. most: stop after so many."""
    problems = []
    for acked, image in recorder.found.values():
        try:
            found = surveyor.survey(image)
            lost = acked.known.keys() - found.keys()
            assert not lost, f"{len(lost)} acknowledged contexts are lost"
            assert not acked.gone & found.keys(), "what was deleted came back"
            assert all(tuple(tokens) in recorder.texts for tokens in found.values()), "half a context"
        except AssertionError as error:
            problems.append((str(error) or repr(error)).splitlines()[0])
            if len(problems) == most:
                break
    return problems
