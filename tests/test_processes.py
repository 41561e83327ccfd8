"""One process writes and others read: each sees one generation, whole, whoever is killed meanwhile.

More than the usual figures: ALAYA_TIERS_READS=10000 (contexts read and compared beside a writer that is killed).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alaya_tiers import DB
from alaya_tiers.errors import SessionClosed, StoreFormat, StoreLocked, StoreReadOnly
from alaya_tiers.seams import SystemDisk
from tests.test_crash import TEXTS, Base, check_kv, forked, inspect, life
from tests.test_db import TIGHT, continued, expected, made, stored
from tests.tiny import prompt

READS = int(os.environ.get("ALAYA_TIERS_READS", "200"))
READERS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


def writer(path: Path) -> Base:
    return Base(SystemDisk(), str(path))


def reader(path: Path) -> Base:
    return Base(SystemDisk(), str(path), read_only=True)


def arrays(path: Path) -> int:
    return len(list(path.rglob("c/0/0/0")))


def whole(base: Base) -> set[str]:
    """What it holds, every byte of it compared."""
    for name in base.contexts.manifest.contexts:
        check_kv(base, name)
    return set(base.contexts.manifest.contexts)


# ---------------------------------------------------------------------- snapshots


def test_a_reader_sees_what_was_stored_when_it_looked(tmp_path: Path) -> None:
    base = writer(tmp_path)
    first = base.store(TEXTS[0])
    beside = reader(tmp_path)
    second = base.store(TEXTS[2])
    assert whole(beside) == {first}
    assert beside.contexts.refresh()
    assert not beside.contexts.refresh()
    assert whole(beside) == {first, second}
    base.close()
    assert whole(beside) == {first, second}, "the writer is gone"
    beside.close()


def test_nothing_a_reader_sees_is_removed_before_it_looks_again(tmp_path: Path) -> None:
    base = writer(tmp_path)
    names = [base.store(text) for text in TEXTS[:3]]
    beside = reader(tmp_path)
    for name in names:
        base.contexts.delete(name)
    assert base.contexts.collect() > 0
    assert whole(beside) == set(names)
    base.close()
    base = writer(tmp_path)  # another writer knows of the reader too
    assert base.engine.accountant.used["ssd"] > 0, "what is kept for a reader takes room"
    assert whole(beside) == set(names)
    assert not beside.contexts.verify()
    assert beside.contexts.refresh()
    assert base.contexts.collect() == base.engine.accountant.used["ssd"] == arrays(tmp_path) == 0
    assert whole(beside) == set()
    beside.close()
    base.close()


def test_sessions_of_a_reader_keep_what_they_have_when_it_moves_on(tmp_path: Path) -> None:
    base = writer(tmp_path)
    name = base.store(TEXTS[0])
    beside = reader(tmp_path)
    session, known = beside.session(TEXTS[0])
    assert known == len(TEXTS[0])
    base.contexts.delete(name)
    assert beside.contexts.refresh()
    assert base.contexts.collect() > 0
    assert session.read(0, 0, known)[0].shape[2] == known
    session.clear()
    deadline = time.monotonic() + 10
    while arrays(tmp_path) and time.monotonic() < deadline:  # what is being read ahead is let go of late
        beside.contexts.refresh()
        base.contexts.collect()
    assert base.contexts.collect() == arrays(tmp_path) == 0
    beside.close()
    base.close()


def test_what_is_stored_again_while_a_reader_has_it_counts_again(tmp_path: Path) -> None:
    """The same name would lead to another file: the reader's record must not be written over."""
    base = writer(tmp_path)
    name = base.store(TEXTS[0])
    beside = reader(tmp_path)
    base.contexts.delete(name)
    files = arrays(tmp_path)
    session, _ = base.session(TEXTS[0])
    assert base.store(TEXTS[0]) == name
    assert whole(beside) == whole(base) == {name}
    session.clear()  # what it had written behind meanwhile, once more, goes with it
    beside.close()
    base.contexts.delete(base.store(TEXTS[2]))
    assert arrays(tmp_path) == files
    assert whole(base) == {name}
    base.close()
    base = writer(tmp_path)
    assert whole(base) == {name}
    base.close()


def test_generation_beside_a_writer(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 120)
    with DB(tmp_path, model=model, **TIGHT) as db:
        (name,) = stored(model, db, text[:, :77])
        with DB(tmp_path, model=model, read_only=True, **TIGHT) as beside:
            db.delete(name)
            session = continued(model, beside, text, 77)
            files = arrays(tmp_path)
            for call in (
                lambda: beside.store(session),
                lambda: beside.delete(name),
                lambda: beside.import_context(text, [(torch.zeros(1, 2, 120, 16),) * 2] * 3),
                lambda: beside.collect(),
            ):
                with pytest.raises(StoreReadOnly, match="read_only=True"):
                    call()
            assert arrays(tmp_path) == files, "a reader wrote into the store"
            assert [c.id for c in beside.contexts()] == [name]
            assert beside.refresh()
            assert not beside.contexts()
            longer = torch.cat([expected(model, text), prompt(1, 5)], 1)
            again = model.generate(longer, past_key_values=session, max_new_tokens=3)
            assert again.equal(expected(model, longer, 3)), "a session that was open goes on"
        assert db.collect() == 0


def test_a_reader_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreFormat, match="no store here"):
        DB(tmp_path / "missing", read_only=True, **TIGHT)
    assert not (tmp_path / "missing").exists()
    base = writer(tmp_path)
    beside = reader(tmp_path)  # nothing was stored yet
    assert whole(beside) == set()
    name = base.store(TEXTS[0])
    assert beside.contexts.refresh()
    assert whole(beside) == {name}
    beside.close()
    base.close()


# ---------------------------------------------------------------------- locks


def child(path: Path, root: Path) -> "subprocess.Popen[str]":
    """A process that has the store open for writing."""
    code = f"from alaya_tiers import DB; db = DB({str(path)!r}); print('open', flush=True); input()"
    made = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    assert made.stdout.readline() == "open\n"
    return made


@pytest.mark.slow
@pytest.mark.alone
def test_a_second_writer_is_refused_at_once_and_takes_over_when_the_first_is_killed(tmp_path: Path, root: Path) -> None:
    with child(tmp_path, root) as other:
        began = time.perf_counter()
        with pytest.raises(StoreLocked, match=f"process {other.pid} .*read_only=True"):
            DB(tmp_path, **TIGHT)
        assert time.perf_counter() - began < 0.1
        other.kill()
        other.wait()
        began = time.perf_counter()
        DB(tmp_path, **TIGHT).close()
        assert time.perf_counter() - began < 1


def finished(work: Callable[[], None]) -> int:
    return os.waitpid(forked(work), 0)[1]


@pytest.mark.slow
def test_a_forked_process_is_told_that_the_database_is_not_its_own(tmp_path: Path, model: Any) -> None:
    """In a process of its own: one with as many threads as this must not fork."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


FORK = """
import sys, torch
torch.set_num_threads(1)
from tests.test_processes import fork
fork(sys.argv[1])
"""


def fork(path: str) -> None:
    model, text = made(), prompt(1, 60)
    with DB(path, model=model, **TIGHT) as db:
        (name,) = stored(model, db, text)
    for read_only in (False, True):
        db = DB(path, model=model, read_only=read_only, **TIGHT)
        session, rest = db.create_session(text)

        def use(db: DB = db, session: Any = session, rest: Any = rest) -> None:
            for call in (
                db.contexts,
                db.verify,
                db.refresh,
                lambda: db.create_session(text),
                lambda: db.store(session),
                lambda: db.delete(name),
                lambda: db.export_context(name),
                lambda: model(input_ids=rest, past_key_values=session),
            ):
                try:
                    call()
                except SessionClosed:
                    continue
                raise AssertionError("a forked process used the database")
            db.close()

        assert finished(use) == 0
        with torch.no_grad():
            model(input_ids=rest, past_key_values=session)
        ready, told = os.pipe()

        def sleep(told: int = told) -> None:
            os.write(told, b".")
            time.sleep(9)

        sleeping = forked(sleep)
        os.read(ready, 1)
        os.close(ready)
        os.close(told)
        db.close()
        DB(path, **TIGHT).close()  # the sleeping child has no part in the lock
        os.kill(sleeping, signal.SIGKILL)
        os.waitpid(sleeping, 0)


# ---------------------------------------------------------------------- all at once, some of them killed

SERVER = """
import torch
torch.set_num_threads(1)
from tests.test_processes import serve
serve()
"""


def look(path: str, seed: int, log: str) -> None:
    """Reads and compares without end, moving on now and then; writes down how much it read."""
    rng, base = random.Random(seed), Base(SystemDisk(), path, read_only=True)
    with open(log, "ab", buffering=0) as file:
        while True:
            seen = list(base.contexts.manifest.contexts)
            for name in rng.sample(seen, min(len(seen), 3)):
                check_kv(base, name)
                file.write(b".")
            assert seen == list(base.contexts.manifest.contexts), "a snapshot changed by itself"
            if rng.random() < 0.1:
                base.close()
                base = Base(SystemDisk(), path, read_only=True)
            elif rng.random() < 0.6:
                base.contexts.refresh()


def serve() -> None:
    """Keeps a writer and readers alive that are killed at random, until enough was read; then looks at what is left."""
    enough, path, rng = int(sys.argv[1]), sys.argv[2], random.Random(7)
    log, seen, seeds, kills = f"{path}.log", f"{path}.seen", iter(range(1 << 30)), 0
    Path(log).touch()
    Path(seen).touch()
    Base(SystemDisk(), path).close()
    work = [lambda: life(path, next(seeds), log)] + [lambda: look(path, next(seeds), seen)] * READERS
    alive = {forked(job): job for job in work}
    while Path(seen).stat().st_size < enough:
        time.sleep(rng.uniform(0.02, 0.3))
        ended = [pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]]
        assert not ended, "one ended by itself"
        victim = rng.choice(list(alive))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        job = alive.pop(victim)
        for _ in range(rng.randint(1, 3)):
            next(seeds)
        alive[forked(job)] = job
        kills += 1
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    inspect(path, log)
    print(kills, Path(seen).stat().st_size)


@pytest.mark.slow
@pytest.mark.timeout(120 + READS)
def test_readers_see_whole_generations_while_anybody_may_be_killed(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(READS), str(tmp_path / "store")], cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=99 + READS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kills, reads = map(int, done.stdout.split())
    print(f"{kills} kills, {reads} contexts read")
    assert kills > 3
    assert reads >= READS
