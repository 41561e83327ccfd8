"""The asynchronous database: the same answers, side by side, and nothing left by what was cancelled."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from alaya_tiers import DB, AsyncDB
from alaya_tiers.errors import InputError
from tests.test_db import SEGMENT, TIGHT, check, expected, made, stored
from tests.test_readme import small_model
from tests.tiny import BLOCK, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


def opened(path: Path, model: Any, **changes: Any) -> AsyncDB:
    return AsyncDB(DB(path, model=model, **(TIGHT | {"device_budget": 32 * 2 * 4096} | changes)))


def kv(model: Any, ids: Any) -> list[Any]:
    """Keys and values, computed elsewhere, in chunks of 16 tokens."""
    plain = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=plain)
    model.set_attn_implementation("alaya")
    layers: list[Any] = list(plain.layers)
    return [
        [(x.keys[:, :, at : at + 16], x.values[:, :, at : at + 16]) for x in layers]
        for at in range(0, ids.shape[1], 16)
    ]


async def test_many_sessions_at_once_give_what_each_gives_alone(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 90)
    prompts = [torch.cat([text[:, : 40 + 9 * n], prompt(1, 7)], 1) for n in range(5)]
    alone = [expected(model, ids) for ids in prompts]

    async def answer(db: AsyncDB, ids: Any) -> Any:
        session, _ = await db.create_session(ids)
        out = await db.generate(session, ids, max_new_tokens=6)
        await db.store(session)
        session.close()
        return out

    async with opened(tmp_path, model) as db:
        await db.run(stored, model, db.db, text)
        outs = await asyncio.gather(*(answer(db, ids) for ids in prompts))
        assert all(out.equal(one) for out, one in zip(outs, alone, strict=True))
        assert len(await db.contexts()) == 6
        assert not await db.verify()
        check(db.db)


async def test_import_and_export_with_asynchronous_iterators(tmp_path: Path, model: Any) -> None:
    ids, said = prompt(1, 80), list[tuple[int, int]]()
    chunks = kv(model, ids)

    async def coming() -> AsyncIterator[Any]:
        for chunk in chunks:
            await asyncio.sleep(0)
            yield chunk

    async with opened(tmp_path, model) as db:
        name = await db.import_context(ids, coming(), say=lambda done, of: said.append((done, of)))
        assert said == [(n, 80) for n in range(16, 81, 16)]
        tokens, parts = await db.export_context(name)
        assert tokens.equal(ids[0])
        assert sum([part[0][0].shape[2] async for part in parts]) == 80
        await db.delete(name)
        assert not await db.contexts()
        with pytest.raises(InputError):
            await db.delete(name)


async def test_a_cancelled_import_was_never_there(tmp_path: Path, model: Any) -> None:
    """Cancelled while it waits for a chunk that never comes, and while it works."""
    ids = prompt(1, 80)
    chunks = kv(model, ids)
    begun = asyncio.Event()

    async def stuck() -> AsyncIterator[Any]:
        yield chunks[0]
        begun.set()
        await asyncio.Event().wait()

    async with opened(tmp_path, model) as db:
        used = db.db._engine.accountant.used["ssd"]
        task = asyncio.ensure_future(db.import_context(ids, stuck()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        going, go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slow() -> Iterator[Any]:
            yield chunks[0]
            loop.call_soon_threadsafe(going.set)
            go.wait()
            yield from chunks[1:]

        task = asyncio.ensure_future(db.import_context(ids, slow()))
        await going.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # twice is once
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await db.contexts()
        assert db.db._engine.mover.ledger.alive().size == 0
        assert db.db._engine.accountant.used["ssd"] == used
        name = await db.import_context(ids, iter(chunks))
        assert [c.id for c in await db.contexts()] == [name]
        check(db.db)


async def test_a_cancelled_verify_and_a_cancelled_session_leave_nothing(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 150)
    async with opened(tmp_path, model) as db:
        await db.run(stored, model, db.db, text)
        seen, blocks = asyncio.Event(), db.db._engine.mover.ledger.alive().size
        go = threading.Event()
        task = asyncio.ensure_future(db.verify(say=lambda done, of: seen.set()))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        open_call = db.db.create_session

        def slow(*arguments: Any, **options: Any) -> Any:
            made = open_call(*arguments, **options)
            loop.call_soon_threadsafe(seen.set)
            go.wait()
            return made

        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        db.db.create_session = slow  # type: ignore[method-assign]
        opening = asyncio.ensure_future(db.create_session(text))
        await seen.wait()
        opening.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert db.db._engine.mover.ledger.alive().size == blocks
        assert (db.db._engine.mover.ledger.refs[db.db._engine.mover.ledger.alive()] == 1).all(), "a session is open"
        await db.delete((await db.contexts())[0].id)
        assert db.db._engine.accountant.used["ssd"] == 0


async def test_generating_stops_at_the_token_it_is_at(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 30)
    async with opened(tmp_path, model) as db:
        session, _ = await db.create_session(text)
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def ran(*_: object) -> None:
            loop.call_soon_threadsafe(begun.set)

        hook = model.register_forward_hook(ran)
        task = asyncio.ensure_future(db.generate(session, text, max_new_tokens=2000))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hook.remove()
        length = session.get_seq_length()
        assert 30 <= length < 1000
        (name,) = await db.store(session)
        tokens = (await db.export_context(name))[0]
        assert tokens[:30].equal(text[0])
        assert tokens.numel() == length


async def test_what_had_not_begun_never_begins(tmp_path: Path, model: Any) -> None:
    async with AsyncDB(DB(tmp_path, model=model, **TIGHT), threads=1) as db:
        go = threading.Event()
        first = asyncio.ensure_future(db.run(go.wait))
        ran = list[int]()
        second = asyncio.ensure_future(db.run(ran.append, 1))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        assert await first
        assert not ran


def test_an_import_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, model: Any) -> None:
    """Every 32 tokens, so at each segment: what is there is found again, and nothing of it written twice."""
    ids, said = prompt(1, 150), list[int]()
    chunks = kv(model, ids)

    def cut(n: int) -> Iterator[Any]:
        yield from chunks[:n]
        raise ConnectionError

    with DB(tmp_path, model=model, **TIGHT) as db:
        with pytest.raises(ConnectionError):
            db.import_context(ids, cut(5))
        assert not db.contexts(), "all or nothing"
        with pytest.raises(ConnectionError):
            db.import_context(ids, cut(7), keep_every=SEGMENT - 3)
        kept = {context.tokens for context in db.contexts()}
        assert kept == set(range(SEGMENT, 7 * 16 + 1, SEGMENT))
    with DB(tmp_path, model=model, **TIGHT) as db:
        name = db.import_context(ids, iter(chunks), keep_every=SEGMENT, say=lambda done, of: said.append(done))
        written = db._engine.traffic.written_bytes
        assert said[-1] == 150
        assert {context.tokens for context in db.contexts()} == {150, *kept}, "what this attempt kept is gone"
        tokens, parts = db.export_context(name)
        assert tokens.equal(ids[0])
        assert torch.cat([part[2][1] for part in parts], 2).equal(torch.cat([chunk[2][1] for chunk in chunks], 2))
        assert written <= (150 - max(kept) + BLOCK) * 3 * 2 * 32 * 4
        assert not db.verify()


@pytest.mark.slow
def test_the_examples_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of docs/serving.md, one after the other."""
    small_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    text, names = (root / "docs" / "serving.md").read_text(), dict[str, object]()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, "docs/serving.md", "exec"), names)
