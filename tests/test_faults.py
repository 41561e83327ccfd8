"""What goes wrong in storage, at every place it can: the answer is right, or a typed error after which all goes on."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from alaya_tiers import AlayaCache
from alaya_tiers.attention import attend_naive
from alaya_tiers.blocks import PAGE
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.engine import Engine
from alaya_tiers.errors import (
    AlayaError,
    BudgetTooSmall,
    IOFailed,
    OutOfSpace,
    SessionClosed,
    StoreCorrupt,
    StoreError,
    StoreFormat,
    StoreLocked,
    StoreMismatch,
    StoreUnwritable,
)
from alaya_tiers.testing_world import Fault
from tests.simulation import Player, Sim, cancelled_at

# ---------------------------------------------------------------------- simulated: the n-th operation fails

FAULTS: dict[str, tuple[dict[str, Any], type[AlayaError] | None]] = {
    "read EIO": ({"op": "read"}, IOFailed),
    "write EIO": ({"op": "write"}, IOFailed),
    "write ENOSPC": ({"op": "write", "error": errno.ENOSPC}, OutOfSpace),
    "open EMFILE": ({"op": "open", "error": errno.EMFILE}, IOFailed),
    "open EACCES": ({"op": "open", "error": errno.EACCES}, StoreUnwritable),
    "remove EIO": ({"op": "remove"}, None),
    "short read": ({"op": "read", "kind": "short"}, None),
    "short write": ({"op": "write", "kind": "short"}, None),
    "bit flip": ({"op": "read", "kind": "flip"}, StoreCorrupt),
}

SPEEDS = [1.0, 100.0]
"""How many times as long as usual each read and write takes."""


def script(player: Player) -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Steps that spill, share, forget and read back."""

    def step(who: Player, layer: int) -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
        yield lambda: who.append(layer)
        yield lambda: who.attend(layer)

    for _ in range(7):
        for layer in player.runs:
            yield from step(player, layer)
            player.read_ahead(1 - layer)
    other = player.fork()
    for layer in player.runs:
        yield from step(other, layer)
        yield from step(player, layer)
    yield player.sim.flush
    player.crop(2)
    for layer in player.runs:
        yield from step(player, layer)
        yield from step(other, layer)
    yield player.sim.flush
    other.crop(0)
    player.crop(0)
    for layer in player.runs:
        yield from step(player, layer)
    yield player.sim.flush


async def insist(sim: Sim, work: Callable[[], Coroutine[Any, Any, None]], kind: type[AlayaError] | None) -> None:
    """Do a step until it succeeds. A persistent fault ends with the first error; then the next try must succeed."""
    for _ in range(3):
        try:
            await work()
            return
        except AlayaError as error:
            if kind is None or not isinstance(error, kind):
                raise AssertionError(f"expected {kind and kind.__name__}, got {error!r}") from error
            sim.disk.faults = [fault for fault in sim.disk.faults if not fault.persistent]
        sim.check()
    await work()


def struck(seed: int, fault: Fault, kind: type[AlayaError] | None, slow: float) -> int:
    """Play the script under a fault; how often it struck."""
    sim = Sim(seed, 7, 5, slow=slow)

    async def main() -> None:
        player = Player(sim)
        sim.disk.faults = [fault]
        for work in script(player):
            await insist(sim, work, kind)
        sim.disk.faults = []
        await sim.settle()
        for layer in player.runs:
            await player.attend(layer)
        await sim.flush()
        full = {number for number, file in enumerate(sim.ssd.files) if file.full and file.live}
        assert full <= set(sim.published), "a full segment was never published"
        await sim.finish(player)
        assert fault.op == "remove" or not sim.disk.files, "files nothing lives in were left"

    try:
        sim.loop.run(main())
    except BaseException as error:
        error.add_note(f"{seed=} {fault} {slow=}")
        raise
    finally:
        sim.close()
    return fault.hits


@pytest.mark.parametrize("slow", SPEEDS)
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistent"])
@pytest.mark.parametrize("name", FAULTS)
def test_every_operation_may_fail(name: str, persistent: bool, slow: float) -> None:
    options, kind = FAULTS[name]
    n = 1
    while struck(n % 5, Fault(n=n, persistent=persistent, **options), kind, slow):
        n += 1
    assert n > 1, "the script never met the fault"


@pytest.mark.parametrize("slow", SPEEDS)
@pytest.mark.parametrize("pages", range(2, 13))
def test_a_full_disk_is_out_of_space_until_there_is_room(pages: int, slow: float) -> None:
    sim = Sim(pages, 7, 5, space=pages * PAGE, slow=slow)

    async def main() -> None:
        player, errors = Player(sim), 0
        for work in script(player):
            try:
                await work()
            except OutOfSpace:
                errors += 1
                sim.check()
                for layer in player.runs:
                    await player.attend(layer)  # dirty blocks may not fill the tier so far that none can be read
                sim.disk.space = (sim.disk.space or 0) + 8 * PAGE
                await insist(sim, work, OutOfSpace)
        assert errors or pages > 6, "the disk never filled"
        await sim.finish(player)

    sim.play(main())


@pytest.mark.parametrize("budget", range(2, 11))
def test_a_used_up_ssd_budget_is_out_of_space(budget: int) -> None:
    sim = Sim(budget, 7, 5, ssd_budget=budget * PAGE)

    async def main() -> None:
        player, errors = Player(sim), 0
        for work in script(player):
            try:
                await work()
            except OutOfSpace:
                errors += 1
                sim.check()
                for layer in player.runs:
                    await player.attend(layer)
                player.crop(1)
        assert errors or budget > 6, "the budget was never used up"
        await sim.finish(player)

    sim.play(main())


def test_a_lost_file_is_corrupt_and_the_rest_stays_right() -> None:
    sim = Sim(0, 7, 5)

    async def main() -> None:
        player = await spilled(sim)
        await sim.mover.flush()
        await sim.settle()
        for file in sim.ssd.files:
            if file.layer == 0 and file.path in sim.disk.files:
                sim.disk.remove(file.path)
                sim.ssd.remove(file.path)  # closes its handle
        with pytest.raises(StoreCorrupt):
            await player.attend(0)
        await player.attend(1)
        await sim.settle()
        player.crop(0)
        await player.step()
        await sim.finish(player)

    sim.play(main())


# ---------------------------------------------------------------------- simulated: cancelled at every suspension


async def spilled(sim: Sim) -> Player:
    """A player with many cold blocks."""
    player = Player(sim)
    for _ in range(12):
        for layer in player.runs:
            await player.append(layer)
            await player.attend(layer)
    return player


def works(player: Player) -> dict[str, Callable[[], Coroutine[Any, Any, Any]]]:
    """What a player that has spilled may be in the middle of; each has to wait."""
    sim, ids = player.sim, player.ids(0)
    cold = ids.T[~sim.mover.ledger.readable(ids).any(0)]

    async def load() -> None:
        for run in cold:
            await sim.mover.load(run, asyncio.Lock())
            player.unpin(run)

    async def append() -> None:
        for _ in range(8):
            await player.append(0)

    return {
        "load": load,
        "attend": lambda: player.attend(0),
        "append": append,
        "flush": sim.mover.flush,
        "step": player.step,
        "read ahead": lambda: sim.mover._read_ahead(player.ids(1)[:, :3].ravel()),
        "write out": lambda: sim.mover.write_out(player.ids(0).ravel()),
    }


WORKS = ["load", "attend", "append", "flush", "step", "read ahead", "write out"]


@pytest.mark.parametrize("slow", SPEEDS)
@pytest.mark.parametrize("what", WORKS)
def test_cancelled_at_any_suspension_nothing_leaks(what: str, slow: float) -> None:
    for seed in range(3):
        k, reached = 1, True
        while reached:
            reached = cancelled(seed, what, k, slow)
            k += 1
        assert k > 2, "it never suspended"


def cancelled(seed: int, what: str, k: int, slow: float) -> bool:
    sim = Sim(seed, 6, 4, slow=slow)

    async def main() -> bool:
        player = await spilled(sim)
        reached = await cancelled_at(k, works(player)[what]())
        sim.check()
        for layer in player.runs:  # other traffic goes on at once, into slots that may have become free
            await player.attend(layer)
        await sim.settle()
        await player.step()
        await sim.finish(player)
        return reached

    try:
        return bool(sim.loop.run(main()))
    except BaseException as error:
        error.add_note(f"{seed=} {what=} {k=} {slow=}")
        raise
    finally:
        sim.close()


@pytest.mark.parametrize("seed", range(20))
def test_closing_in_the_middle_of_loads_leaves_nothing_running(seed: int) -> None:
    """After Mover.close nothing reads or writes memory, whatever was waiting; who waited gets an error, not silence."""
    sim = Sim(seed, 6, 4)

    async def main() -> None:
        player = await spilled(sim)
        gate, book = asyncio.Lock(), sim.mover.ledger
        columns = [c for c in player.ids(0).T if not book.readable(c).any()]
        loads = [asyncio.get_running_loop().create_task(sim.mover.load(c, gate)) for c in columns]
        await asyncio.sleep(sim.rng.random() * 3e-3)
        await sim.mover.close()
        assert not sim.executor.running, "a thread still reads or writes memory that is about to be freed"
        await asyncio.wait(loads, timeout=100)
        assert not sim.executor.running
        for load in loads:
            assert load.done(), "a load waits forever"
            assert load.cancelled() or load.exception() is None or isinstance(load.exception(), AlayaError)

    try:
        sim.loop.run(main())
    finally:
        sim.loop.abandon()


# ---------------------------------------------------------------------- real threads, real files


class Talk:
    """A session and, beside it, its keys and values in plain tensors: what attention must give."""

    heads, dim, layers = 2, 16, 2

    def __init__(self, path: Path | None = None, **settings: Any) -> None:
        base = {
            "device_budget": 8 * PAGE,
            "host_budget": 4 * PAGE,
            "block_tokens": 32,
            "segment_tokens": 64,
            "sink_tokens": 0,
        }
        self.session = Session(Engine(Settings(**(base | settings)), None if path is None else os.fspath(path)))
        self.kv: dict[int, Tensor] = {n: torch.empty(2, 1, self.heads, 0, self.dim) for n in range(self.layers)}
        self.made = torch.Generator().manual_seed(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.session.engine.close()

    @property
    def length(self) -> int:
        return int(self.kv[0].shape[3])

    def step(self, tokens: int = 32) -> None:
        """Append and attend, in every layer; as before when that fails."""
        length = self.length
        try:
            for layer in range(self.layers):
                new = torch.randn(2, 1, self.heads, tokens, self.dim, generator=self.made)
                self.session.update(layer, new[0], new[1])
                self.kv[layer] = torch.cat([self.kv[layer], new], 3)
                self.attend(layer)
        except BaseException:
            self.crop(length)
            raise

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.step()

    def crop(self, length: int) -> None:
        self.session.crop(length)
        self.kv = {n: kv[..., :length, :] for n, kv in self.kv.items()}

    def attend(self, layer: int) -> None:
        """Compare attention with that over the plain tensors."""
        k, v = self.kv[layer][:, 0]
        q = torch.randn(self.heads, 1, self.dim, generator=self.made)
        out = self.session.attention(layer, q[None], [Visible.all(self.length, 1)], 0.25)
        torch.testing.assert_close(out[0], attend_naive(q, k, v, 0.25).out, rtol=1e-4, atol=1e-5)

    def attend_all(self) -> None:
        for layer in range(self.layers):
            self.attend(layer)

    def pinned(self) -> int:
        with self.session.engine.mover.lock:
            return self.session.engine.mover.ledger.pinned_count()

    def cold(self) -> tuple[Path, int]:
        """A place of layer 0 on disk, file and offset, whose block is nowhere else."""
        engine = self.session.engine
        with engine.mover.lock:
            book = engine.mover.ledger
            ids = self.session.layers[0].ids(self.session.layers[0].rows[0].first).ravel()
            cold = ids[~book.readable(ids) & ~book.coming(ids)]
            return Path(engine.mover.ssd.files[book.file[cold[0]]].path), int(book.offset[cold[0]])

    def forget_handles(self) -> None:
        """Close the files, so that they are opened again."""
        self.session.engine.mover.ssd._handles.close()


@contextmanager
def tmpfs(path: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own of ``nbytes``; skips where one cannot be mounted."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_really_full_disk_is_out_of_space_and_then_goes_on(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", 40 * PAGE) as path, Talk(path / "store") as talk:
        ballast = path / "ballast"
        ballast.write_bytes(bytes(12 * PAGE))
        with pytest.raises(OutOfSpace) as caught:
            talk.steps(40)
        assert caught.value.errno == errno.ENOSPC
        assert "free some space" in str(caught.value)
        length = talk.length
        assert length > 0
        for _ in range(3):
            talk.attend_all()
            with pytest.raises(OutOfSpace):
                talk.steps(3)
        assert talk.length == length
        talk.attend_all()
        ballast.unlink()
        talk.step()
        talk.attend_all()
        assert talk.pinned() == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "zeros"])
def test_a_damaged_file_is_corrupt_at_attention(tmp_path: Path, damage: str) -> None:
    with Talk(tmp_path, prefetch="none") as talk:
        talk.steps(12)
        victim, offset = talk.cold()
        data = victim.read_bytes()
        if damage == "flip":
            victim.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        elif damage == "truncate":
            os.truncate(victim, 100)
        elif damage == "zeros":
            victim.write_bytes(bytes(len(data)))
        else:
            victim.unlink()
        talk.forget_handles()
        for _ in range(2):
            with pytest.raises(StoreCorrupt) as caught:
                talk.attend(0)
            assert caught.value.filename == str(victim)
            assert talk.pinned() == 0
        talk.attend(1)
        talk.crop(0)
        talk.steps(12)


def test_a_damaged_file_leaves_other_layers_and_a_repaired_one_right(tmp_path: Path) -> None:
    with Talk(tmp_path, prefetch="next") as talk:
        talk.steps(12)
        victim, _ = talk.cold()
        data = victim.read_bytes()
        victim.write_bytes(bytes(len(data)))
        with pytest.raises(StoreCorrupt):
            talk.step()
        victim.write_bytes(data)
        talk.step()
        talk.attend_all()


def test_a_segment_whose_publishing_failed_is_published_by_the_next_flush(tmp_path: Path) -> None:
    """Its blocks are all written, so no write will ever bring it up again."""
    with Talk(tmp_path) as talk:
        engine, failed = talk.session.engine, list[int]()
        talk.step()
        publish = engine.mover.publish

        async def failing(number: int) -> None:
            if len(failed) < 3:
                failed.append(number)
                raise IOFailed(errno.EIO, "cannot write", "index")
            await publish(number)

        engine.mover.publish = failing
        for _ in range(20):
            with contextlib.suppress(IOFailed):
                talk.step()
        for _ in range(5):
            with contextlib.suppress(IOFailed):
                talk.session.flush()
        assert len(failed) == 3
        files = [Path(file.path) for file in engine.mover.ssd.files if file.live]
        assert files
        missing = [path for path in files if not (path.parents[3] / "zarr.json").exists()]
        assert not missing, "a flushed session has segments that no Zarr reader finds"


def test_an_attention_that_fails_halfway_lets_go_of_its_blocks() -> None:
    """Also while somebody still holds the exception, and so the frames it went through."""

    def broken(positions: Tensor) -> Tensor:
        raise ZeroDivisionError("a user's mask function")

    with Talk() as talk:
        talk.steps(12)
        q = torch.randn(1, 2, 1, 16)
        held = None
        try:
            talk.session.attention(0, q, [Visible.all(talk.length, 1, broken)], 0.25)
        except ZeroDivisionError as error:
            held = error
        assert held is not None
        assert talk.pinned() == 0, "the traceback keeps a generator alive, and that keeps the pins"
        talk.steps(4)


def test_closing_while_an_exception_holds_a_half_done_attention() -> None:
    """``with cache: ...`` that ends by an exception from the middle of attention: it must come out, not hang."""

    def broken(positions: Tensor) -> Tensor:
        raise KeyboardInterrupt

    def interrupted() -> None:
        with Talk(batch_bytes=2 * PAGE) as talk:
            talk.steps(12)
            talk.session.attention(0, torch.randn(1, 2, 1, 16), [Visible.all(talk.length, 1, broken)], 0.25)

    def body() -> None:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        ended.set()

    ended = threading.Event()
    threading.Thread(target=body, daemon=True).start()
    assert ended.wait(20), "closing, or clearing the exception after it, hangs"


CLOSING = """
import threading, time
from tests.test_faults import PAGE, SessionClosed, Talk

def attend(talk, outcome, started):
    try:
        while True:
            talk.attend_all()
            started.set()
    except BaseException as error:
        outcome.append(error)

for n in range(30):
    talk, outcome, started = Talk(batch_bytes=2 * PAGE), [], threading.Event()
    talk.steps(12)
    other = threading.Thread(target=attend, args=(talk, outcome, started), daemon=True)
    other.start()
    assert started.wait(20)
    time.sleep(0.001 * (n % 5))
    talk.session.engine.close()
    other.join(5)
    assert not other.is_alive(), f"the other thread waits forever, {n=}"
    assert isinstance(outcome[0], SessionClosed), repr(outcome[0])
"""


@pytest.mark.slow
def test_closing_while_another_thread_attends(root: Path) -> None:
    """The other thread gets its answer or SessionClosed: no hang, and no memory that goes away under it (a signal)."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CLOSING], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-1500:]}"


@pytest.mark.parametrize("call", ["update", "attention", "gather", "crop", "fork", "flush", "select", "stats"])
def test_after_closing_every_call_says_so(call: str) -> None:
    with Talk() as talk:
        talk.steps(6)
    session, kv = talk.session, torch.zeros(1, 2, 1, 16)
    calls: dict[str, Callable[[], object]] = {
        "update": lambda: session.update(0, kv, kv),
        "attention": lambda: session.attention(0, kv, [Visible.all(talk.length, 1)], 1.0),
        "gather": lambda: session.gather(0),
        "crop": lambda: session.crop(1),
        "fork": lambda: session.fork(0),
        "flush": session.flush,
        "select": lambda: session.select(0, [0, 0]),
    }
    if call == "stats":
        assert session.stats().tokens == talk.length
        return
    with pytest.raises(SessionClosed):
        calls[call]()


# ---------------------------------------------------------------------- the directory


def opened(path: str | os.PathLike[str], model: dict[str, Any] | None = None) -> None:
    Engine(Settings(), os.fspath(path), model).close()


def test_a_path_that_is_a_file_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreUnwritable):
            opened(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_cannot_be_written_is_unwritable(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "fixed", 10 * PAGE) as path:
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        with contextlib.suppress(OSError):
            (path / "probe").touch()
            pytest.skip("this kernel writes to file systems that are mounted read-only")
        for where in (path, path / "below"):
            with pytest.raises(StoreUnwritable):
                opened(where)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreUnwritable):
        opened(tmp_path / "closed" / "below")


def test_a_directory_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(StoreFormat, match=r"thesis\.tex"):
        opened(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "a refused directory is not written to"


@pytest.mark.alone
def test_a_second_opening_is_locked_until_the_first_ends(tmp_path: Path) -> None:
    first = Engine(Settings(), str(tmp_path))
    began = time.monotonic()
    with pytest.raises(StoreLocked):
        opened(tmp_path)
    assert time.monotonic() - began < 0.1
    first.close()
    opened(tmp_path)


def test_a_store_of_another_model_names_the_difference(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
    with AlayaCache(config=config, path=tmp_path) as cache:
        cache.update(torch.zeros(1, 2, 8, 32), torch.zeros(1, 2, 8, 32), 0)
        cache.flush()
    AlayaCache(config=config, path=tmp_path).close()
    with pytest.raises(StoreMismatch, match=r"rms_norm_eps is 1e-06 there and 0\.5 here"):
        AlayaCache(config=LlamaConfig(**(config.to_dict() | {"rms_norm_eps": 0.5})), path=tmp_path)
    AlayaCache(config=config, path=tmp_path).close()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"zarr_format": 3, "attributes": {"alaya_tiers": {"format": 99, "model": None}}}, StoreFormat),
        ({"zarr_format": 3, "attributes": {}}, StoreError),
        ({"zarr_format": 2}, StoreError),
        ([], StoreError),
        (None, StoreError),
        ({"zarr_format": 3, "attributes": {"alaya_tiers": {"format": "x", "model": None}}}, StoreError),
        ({"zarr_format": 3, "attributes": {"alaya_tiers": {"format": 1e400, "model": None}}}, StoreError),
        ({"zarr_format": 3, "attributes": {"alaya_tiers": {"format": 1, "model": [1]}}}, StoreError),
        ({"zarr_format": 3, "attributes": {"alaya_tiers": [[]]}}, StoreError),
    ],
)
def test_a_newer_or_foreign_or_damaged_root_is_refused(tmp_path: Path, content: object, kind: type[StoreError]) -> None:
    (tmp_path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(kind):
        opened(tmp_path, {"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) in (["zarr.json"], ["lock", "zarr.json"])


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe"])
def test_a_root_that_is_no_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(raw)
    with pytest.raises(StoreError):
        opened(tmp_path)


# ---------------------------------------------------------------------- budgets


def fits(layers: int, **budgets: int) -> BudgetTooSmall | None:
    """What a life under these budgets raises."""
    talk = Talk(None, **budgets)
    talk.layers, talk.kv = layers, dict.fromkeys(range(layers), talk.kv[0])
    with talk:
        try:
            for _ in range(9):
                talk.step(20)
        except BudgetTooSmall as error:
            return error
    return None


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_smallest_budget_an_error_names_works(tier: str, layers: int) -> None:
    name = f"{tier}_budget"
    error = fits(layers, **{name: 0})
    assert error is not None
    tries = 0
    while error is not None:
        assert error.tier == tier
        assert error.smallest > error.budget, "naming a budget that was just too small helps nobody"
        smallest, tries = error.smallest, tries + 1
        error = fits(layers, **{name: smallest})
    below = fits(layers, **{name: smallest - PAGE})
    assert below is not None, "a slot less does as well"
    assert below.smallest == smallest
    assert layers > 1 or tries == 1, "the first error did not name a budget that works"


# ---------------------------------------------------------------------- processes


@pytest.mark.timeout(60)
def test_use_in_a_forked_child_says_so_and_leaves_the_parents_files(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.steps(8)
        before = {str(p) for p in tmp_path.rglob("c/0/0/0")}
        assert before
        kv = torch.zeros(1, 2, 1, 16)
        uses: list[Callable[[], object]] = [lambda: talk.session.update(0, kv, kv), lambda: talk.session.gather(0)]
        for n, use in enumerate(uses):
            child = os.fork()
            if not child:
                signal.alarm(10)
                try:
                    use()
                    code = 1
                except SessionClosed:
                    code = 0
                except BaseException:
                    code = 2
                talk.session.engine.close()
                os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == 0, f"use {n} in the child: {status} (1: it worked, 2: another error, -14: it hung)"
        assert before <= {str(p) for p in tmp_path.rglob("c/0/0/0")}
        talk.step()
        talk.attend_all()


CHILD = """
import sys, time
from pathlib import Path
from tests.test_faults import Talk
plain, flushed = Talk(Path(sys.argv[1])), Talk(Path(sys.argv[2]))
for talk in (plain, flushed):
    talk.steps(10)
flushed.session.flush()
temporary = Talk()
temporary.step()
print("ready", temporary.session.engine.store.path, flush=True)
time.sleep(100)
"""


@pytest.mark.slow
def test_what_a_killed_process_left_is_collected_and_what_it_flushed_is_kept(tmp_path: Path, root: Path) -> None:
    plain, flushed = tmp_path / "plain", tmp_path / "flushed"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"ALAYA_TIERS_DIR": str(temporary), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", CHILD, str(plain), str(flushed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline().startswith("ready")
            with pytest.raises(StoreLocked):
                opened(plain)
        finally:
            child.kill()
    assert list(plain.glob("session-*"))
    assert list(temporary.iterdir())
    opened(plain)
    assert not list(plain.glob("session-*")), "what nobody can read later was left"
    files = sorted(p.relative_to(flushed) for p in flushed.glob("session-*/**/*"))
    assert files
    opened(flushed)
    assert sorted(p.relative_to(flushed) for p in flushed.glob("session-*/**/*")) == files
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALAYA_TIERS_DIR", str(temporary))
        Engine(Settings()).close()
    deadline = time.monotonic() + 60
    while list(temporary.iterdir()):
        assert time.monotonic() < deadline, "a dead process's temporary store was left"
        time.sleep(0.01)
    shutil.rmtree(flushed)
