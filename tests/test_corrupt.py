"""What happens after damage was found: the tokens of a run without a cache, and nobody else is affected.

More cases than usual: ALAYA_TIERS_DAMAGES=500.
"""

import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from alaya_tiers import DB
from alaya_tiers.errors import CorruptWarning, StoreCorrupt, StoreError
from tests.crash import CrashDisk, Image
from tests.test_crash import TEXTS, Base, check_kv
from tests.test_db import SEGMENT, check, continued, expected, made, opened, stored
from tests.tiny import BLOCK, prompt

CASES = int(os.environ.get("ALAYA_TIERS_DAMAGES", "8"))
TEXT = prompt(1, 120)
OTHER = 96 - TEXT


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A context, one that begins as it does, and a stranger."""
    path = tmp_path_factory.mktemp("written") / "store"
    with opened(path) as db:
        stored(model, db, TEXT)
        stored(model, db, branch())
        stored(model, db, OTHER)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "store"))


def branch() -> Tensor:
    """The same up to token 70, which is inside a block of the third segment."""
    ids = TEXT.clone()
    ids[:, 70:] = 3
    return ids


def place(path: Path, ids: Tensor, run: int, layer: int = 1) -> tuple[Path, int]:
    """The shard that has the blocks of a run of a stored text, and where the first of them begins in it."""
    with opened(path) as db:
        contexts = db._contexts
        names = contexts.manifest.chain(next(c.id for c in db.contexts() if db.export_context(c.id)[0].equal(ids[0])))
        segment, number = divmod(run, SEGMENT // BLOCK)
        record = contexts._prefixes.record(names[segment]).layers[layer]
        return path / record.files[record.where[number]] / "c/0/0/0", int(number) * 4096


def damage(path: Path, ids: Tensor, run: int, layer: int = 1) -> Callable[[], None]:
    """Flip a bit of a block; what mends it."""
    file, offset = place(path, ids, run, layer)
    raw = file.read_bytes()
    file.write_bytes(raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :])
    return lambda: (file.write_bytes(raw), None)[1]


def warned(db: DB, ids: Tensor, model: Any, **options: Any) -> tuple[Any, Tensor]:
    with pytest.warns(CorruptWarning):
        return db.create_session(ids, model=model, **options)


# ---------------------------------------------------------------------- what each setting does


def test_an_error_in_the_middle_says_whose_it_is_and_what_to_do(path: Path, model: Any) -> None:
    damage(path, TEXT, 5)
    with opened(path) as db:
        session, rest = db.create_session(TEXT, model=model)
        assert rest.shape[1] == 1
        with pytest.raises(StoreCorrupt, match=r"create_session\(\) again") as caught:
            model.generate(TEXT, past_key_values=session, max_new_tokens=2)
        error, manifest = caught.value, db._contexts.manifest
        assert (error.layer, error.block) == (1, 5 % (SEGMENT // BLOCK))
        assert error.segment is not None
        assert error.segment in manifest.chain(error.contexts[0])
        assert len(error.contexts) == 2, "the context and the one that begins as it does"
        assert db.contexts()[2].id not in error.contexts
        assert error.segment[:12] in str(error)
        assert error.contexts[0][:12] in str(error)


def test_recompute_reuses_what_is_before_the_damage_and_storing_mends_it(path: Path, model: Any) -> None:
    damage(path, TEXT, 5)
    with opened(path) as db:
        first, _ = db.create_session(TEXT, model=model)
        with pytest.raises(StoreCorrupt):
            model.generate(TEXT, past_key_values=first, max_new_tokens=2)
        session, rest = warned(db, TEXT, model)
        assert rest.shape[1] == 120 - 5 * BLOCK
        assert model.generate(TEXT, past_key_values=session, max_new_tokens=4).equal(expected(model, TEXT, 4))
        db.store(session)
        assert not db.verify()
        continued(model, db, branch(), 119).close()  # it shared the segment: mended with it
        first.close()
        check(db)
    with opened(path) as db:
        assert not db.verify()
        for ids in (TEXT, branch(), OTHER):
            continued(model, db, ids, 119).close()
        check(db)


def test_drop_forgets_the_damage_for_good_and_nothing_else(path: Path, model: Any) -> None:
    damage(path, TEXT, 5)
    before = sum(f.stat().st_size for f in path.rglob("c/0/0/0"))
    with opened(path, on_corrupt="drop", check_on_open=True) as db:
        assert len(db.contexts()) == 3
        session, rest = warned(db, TEXT, model)
        assert rest.shape[1] == 120 - SEGMENT
        assert sorted(c.tokens for c in db.contexts()) == [SEGMENT, 120]
        assert model.generate(TEXT, past_key_values=session, max_new_tokens=4).equal(expected(model, TEXT, 4))
        assert not db.verify()
        continued(model, db, OTHER, 119).close()
        check(db)
    assert sum(f.stat().st_size for f in path.rglob("c/0/0/0")) < before
    with opened(path) as db:
        continued(model, db, branch(), SEGMENT).close()


def test_raise_refuses_the_prompts_that_need_it_and_no_others(path: Path, model: Any) -> None:
    damage(path, branch(), 9)
    with opened(path, on_corrupt="raise", check_on_open=True) as db:
        with pytest.raises(StoreCorrupt) as caught:
            db.create_session(branch(), model=model)
        assert [c.id for c in db.contexts() if c.id in caught.value.contexts] == [db.contexts()[1].id]
        for ids in (TEXT, OTHER):
            continued(model, db, ids, 119).close()
        session, rest = warned(db, branch(), model, on_corrupt="recompute")
        assert rest.shape[1] == 120 - 9 * BLOCK
        session.close()
        check(db)


def test_without_a_check_damage_is_known_once_it_was_met_or_verified(path: Path, model: Any) -> None:
    mend = damage(path, TEXT, 2)
    with opened(path) as db:
        assert db.create_session(TEXT, model=model)[1].shape[1] == 1
        assert {d.kind for d in db.verify()} == {"blocks"}
        assert warned(db, TEXT, model)[1].shape[1] == 120 - 2 * BLOCK
    mend()
    with opened(path) as db:
        continued(model, db, TEXT, 119).close()


@pytest.mark.parametrize("what", ["record", "link", "gone"])
@pytest.mark.parametrize("policy", ["raise", "recompute", "drop"])
def test_records_links_and_missing_files_are_damage_like_any_other(
    path: Path, model: Any, what: str, policy: str
) -> None:
    file, _ = place(path, TEXT, 4, 2)
    with opened(path) as db:
        contexts = db._contexts
        name = contexts.manifest.chain(db.contexts()[0].id)[1]
    if what == "record":
        (path / "segments" / name / "zarr.json").unlink()
    elif what == "link":
        file.rename(path.parent / "moved")
        file.symlink_to(path.parent / "moved")
    else:
        file.unlink()
    with opened(path, on_corrupt=policy, check_on_open=True) as db:
        if policy == "raise":
            with pytest.raises(StoreCorrupt) as caught:
                db.create_session(TEXT, model=model)
            assert len(caught.value.contexts) == 2
        else:
            session, rest = warned(db, TEXT, model)
            assert rest.shape[1] == 120 - SEGMENT
            assert model.generate(TEXT, past_key_values=session, max_new_tokens=3).equal(expected(model, TEXT, 3))
            db.store(session)
            assert not db.verify()
            continued(model, db, TEXT, 119).close()
        continued(model, db, OTHER, 119).close()
        check(db)


def test_importing_a_damaged_context_again_mends_it(path: Path, model: Any) -> None:
    damage(path, OTHER, 7)
    with opened(path, model=model) as db:
        name = db.contexts()[2].id
        assert [d.contexts for d in db.verify()] == [(name,)]
    with opened(path.parent / "whole", model=model) as copy:
        stored(model, copy, OTHER)
        ids, chunks = copy.export_context(copy.contexts()[0].id)
        with opened(path, model=model) as db:
            db.verify()
            assert db.import_context(ids, chunks) == name
            assert not db.verify()
            continued(model, db, OTHER, 119).close()


def test_a_session_that_reads_damaged_blocks_cannot_be_stored_as_if_it_were_whole(path: Path, model: Any) -> None:
    damage(path, TEXT, 1, layer=0)
    with opened(path) as db:
        session, _ = db.create_session(TEXT, model=model)
        db.verify()
        with pytest.raises(StoreCorrupt):
            db.store(session, TEXT)
        assert len(db.contexts()) == 3


# ---------------------------------------------------------------------- many sessions, any order


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(CASES))
def test_any_order_of_sessions_gives_the_tokens_of_no_cache(
    written: Path, tmp_path: Path, model: Any, seed: int
) -> None:
    """Damage comes at any time to any block of any context under up to 8 sessions, which go on in any order."""
    rng = random.Random(seed)
    path = Path(shutil.copytree(written, tmp_path / "store"))
    texts = [TEXT, branch(), OTHER]
    victim, run, layer = rng.choice(texts), rng.randrange(120 // BLOCK), rng.randrange(3)
    policy = rng.choice(["recompute", "drop"])
    file, offset = place(path, victim, run, layer)
    wanted = {n: expected(model, ids, 3) for n, ids in enumerate(texts)}
    waiting = [rng.randrange(3) for _ in range(rng.randint(1, 8))]
    with opened(path, device_budget=64 * 2 * 4096, on_corrupt=policy, check_on_open=rng.random() < 0.3) as db:
        affected = _needing(db, file)
        open_: list[tuple[int, Any]] = []
        struck, met = rng.randint(0, 2 * len(waiting)), set[int]()
        blamed = set[str]()
        for step in range(10_000):
            if step == struck:
                _flip(file, offset)
            if not waiting and not open_:
                break
            if waiting and (not open_ or rng.random() < 0.5):
                n = waiting.pop()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CorruptWarning)
                    open_.append((n, db.create_session(texts[n], model=model)[0]))
                continue
            n, session = open_.pop(rng.randrange(len(open_)))
            try:
                assert model.generate(texts[n], past_key_values=session, max_new_tokens=3).equal(wanted[n])
                if rng.random() < 0.3:
                    db.store(session)
                    affected |= _needing(db, file)
            except StoreCorrupt as error:
                blamed.update(error.contexts)
                met.add(n)
                waiting.append(n)  # what the error says: once more
            session.close()
        check(db)
        assert blamed <= affected, "contexts that do not need the block"
        assert not met & ({0, 1} if victim is OTHER else {2}), "a stranger was affected"
    with opened(path, on_corrupt=policy, check_on_open=True) as db, warnings.catch_warnings():
        warnings.simplefilter("ignore", CorruptWarning)
        now = set[str]()
        for n, ids in enumerate(texts):
            session, _ = db.create_session(ids, model=model)
            assert model.generate(ids, past_key_values=session, max_new_tokens=3).equal(wanted[n])
            now |= {*db.store(session)}
            session.close()
        assert now.isdisjoint({c for d in db.verify() for c in d.contexts}), "what was just stored is not whole"


def _needing(db: DB, file: Path) -> set[str]:
    """Contexts with a segment in this file."""
    folder = file.parents[3].relative_to(db._engine.store.path).as_posix()
    manifest = db._contexts.manifest
    return {c for c in manifest.contexts if any(folder in manifest.segments[name].files for name in manifest.chain(c))}


def _flip(file: Path, offset: int) -> None:
    if file.exists():
        with file.open("r+b") as opened_file:
            opened_file.seek(offset)
            byte = opened_file.read(1)
            opened_file.seek(offset)
            opened_file.write(bytes([byte[0] ^ 1]))


# ---------------------------------------------------------------------- a crash while it is mended


@pytest.mark.slow
def test_a_crash_while_a_context_is_mended_harms_no_other() -> None:
    """At every operation: the others are whole, and the damaged one is whole, or still known to be damaged."""
    base = Base(disk := CrashDisk())
    names = [base.store(text) for text in TEXTS]
    record = base.contexts._prefixes.record(base.contexts.manifest.chain(names[3])[-1]).layers[0]
    victim = f"/store/{record.files[record.where[-1]]}/c/0/0/0"
    base.close()
    image: Image = disk.image(random.Random(0), 1)
    offset = int(record.where.size - 1) * 4096
    image[victim] = image[victim][:offset] + bytes([image[victim][offset] ^ 1]) + image[victim][offset + 1 :]
    left: list[Image] = []
    rng = random.Random(1)
    disk = CrashDisk(image)
    base = Base(disk)
    assert {c for d in base.contexts.verify() for c in d.contexts} == {names[3]}
    disk.after_each = lambda disk: left.extend(disk.image(rng, share) for share in (0, 1, 0.5))
    base.store(TEXTS[3])
    disk.after_each = lambda disk: None
    assert not base.contexts.verify()
    base.close()
    outcomes = {_survey(one, names) for one in left}
    assert outcomes == {True, False}, "at first it is damaged, in the end it is not"
    assert _survey(left[-2], names)


def _survey(image: Image, names: list[str]) -> bool:
    """Whether the last context is whole; the others must be."""
    base = Base(CrashDisk(image))
    try:
        assert set(base.contexts.manifest.contexts) == set(names)
        for name in names[:3]:
            check_kv(base, name)
        damaged = {c for d in base.contexts.verify() for c in d.contexts if d.kind in ("record", "blocks")}
        assert damaged <= {names[3]}
        if not damaged:
            check_kv(base, names[3])
        else:
            with pytest.raises(StoreError):
                check_kv(base, names[3])
        return not damaged
    finally:
        base.close()


def test_the_loop_in_the_docs_gives_the_tokens_of_an_undamaged_store(path: Path, model: Any, root: Path) -> None:
    damage(path, TEXT, 6)
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "stores.md").read_text(), re.DOTALL)
    with opened(path) as db:
        names: dict[str, Any] = {"db": db, "ids": TEXT, "model": model}
        with pytest.warns(CorruptWarning):
            exec(code, names)
        assert names["output"].equal(expected(model, TEXT, 8))
