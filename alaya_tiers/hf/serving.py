"""The database for servers: every call that may take long is awaited, and may be cancelled."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError as NeverRan
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from alaya_tiers.errors import InputError
from alaya_tiers.hf.db import DB, KV
from alaya_tiers.hf.stored import StoredCache
from alaya_tiers.manifest import Context
from alaya_tiers.parts import Chunk, Say, silent
from alaya_tiers.verify import Damage

T = TypeVar("T")


class Stopped(BaseException):
    """The task that waits for a call was cancelled. Never leaves this module."""


class Call:
    """One call on its way in a thread. say: who is told of its progress, on the event loop."""

    def __init__(self, say: Say) -> None:
        self._loop, self._say, self.stopped = asyncio.get_running_loop(), say, False
        self._pulling: Future[Any] | None = None

    def progress(self, done: int, of: int) -> None:
        """In the thread: tell how far it is. Raises Stopped."""
        if self.stopped:
            raise Stopped
        if self._say is not silent:
            self._loop.call_soon_threadsafe(self._say, done, of)

    def pull(self, chunks: AsyncIterator[Chunk]) -> Any:
        """In the thread: what an asynchronous iterator gives, one after the other. Raises Stopped."""

        async def following() -> Chunk | None:
            return await anext(chunks, None)

        while True:
            self._pulling = asyncio.run_coroutine_threadsafe(following(), self._loop)
            if self.stopped:
                self._pulling.cancel()
            try:
                chunk = self._pulling.result()
            except NeverRan:
                raise Stopped from None
            if chunk is None:
                return
            yield chunk

    def stop(self) -> None:
        """On the loop: have it end at the next opportunity."""
        self.stopped = True
        if self._pulling is not None:
            self._pulling.cancel()


class AsyncDB:
    """A DB whose calls are awaited, for any number of tasks at once. Everything else is as in DB.

    db: what does the work; it is closed with this. threads: so many calls run side by side, the others wait for
    their turn in order.

    A call that is cancelled has ended when CancelledError is raised, and left nothing behind: a session that was not
    handed out is closed, an import or a store that is not complete was never there. What was committed before the
    cancellation arrived stays stored. All methods raise what those of DB raise.
    """

    def __init__(self, db: DB, threads: int = 8) -> None:
        self.db = db
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="contexts")

    # ------------------------------------------------------------------ sessions
    async def create_session(
        self, input_ids: Tensor | Sequence[int], *, model: PreTrainedModel | None = None, **options: Any
    ) -> tuple[StoredCache, Tensor]:
        """See DB.create_session."""
        work = partial(self.db.create_session, input_ids, model=model, **options)
        return await self._call(lambda call: work(), undo=lambda made: made[0].close())

    async def generate(
        self, session: StoredCache, input_ids: Tensor, *, model: PreTrainedModel | None = None, **options: Any
    ) -> Tensor:
        """What ``model.generate(input_ids, past_key_values=session, **options)`` gives; other tasks go on meanwhile.

        Cancelled, it stops after the token it is at; the session holds what was generated until then.
        """
        model = self.db.model if model is None else model
        if model is None:
            raise InputError("which model is to generate? Pass model=, here or to DB()")
        criteria = [*options.pop("stopping_criteria", [])]
        generate: Any = model.generate

        def work(call: Call) -> Tensor:
            stopping = StoppingCriteriaList([*criteria, _Stop(call)])
            out: Tensor = generate(input_ids, past_key_values=session, stopping_criteria=stopping, **options)
            return out

        return await self._call(work)

    async def run(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What ``work(*arguments, **options)`` gives, in one of the threads: a forward by hand, for example.

        Cancelled, it is waited for.
        """
        return await self._call(lambda call: work(*arguments, **options))

    async def store(
        self, session: StoredCache, input_ids: Tensor | Sequence[int] | None = None, *, say: Say = silent
    ) -> list[str]:
        """See DB.store."""
        return await self._call(lambda call: self.db.store(session, input_ids, say=call.progress), say)

    # ------------------------------------------------------------------ contexts
    async def import_context(
        self,
        input_ids: Tensor | Sequence[int],
        kv: KV | AsyncIterator[Chunk],
        *,
        say: Say = silent,
        **options: Any,
    ) -> str:
        """See DB.import_context; the chunks may come from an asynchronous iterator as well."""

        def work(call: Call) -> str:
            given = call.pull(kv) if isinstance(kv, AsyncIterator) else kv
            return self.db.import_context(input_ids, given, say=call.progress, **options)

        return await self._call(work, say)

    async def export_context(self, context: str) -> tuple[Tensor, AsyncIterator[Chunk]]:
        """See DB.export_context. Close the iterator, or come to its end."""
        tokens, chunks = await self._call(lambda call: self.db.export_context(context))
        return tokens, self._each(chunks)

    async def build_index(self, context: str, *, say: Say = silent) -> None:
        """See DB.build_index."""
        await self._call(lambda call: self.db.build_index(context, say=call.progress), say)

    async def contexts(self) -> list[Context]:
        """See DB.contexts."""
        return await self._call(lambda call: self.db.contexts())

    async def delete(self, context: str) -> None:
        """See DB.delete."""
        await self._call(lambda call: self.db.delete(context))

    async def verify(self, *, say: Say = silent) -> list[Damage]:
        """See DB.verify."""
        return await self._call(lambda call: self.db.verify(say=call.progress), say)

    async def refresh(self) -> bool:
        """See DB.refresh."""
        return await self._call(lambda call: self.db.refresh())

    async def collect(self) -> int:
        """See DB.collect."""
        return await self._call(lambda call: self.db.collect())

    # ------------------------------------------------------------------ life
    async def close(self) -> None:
        """Wait for all calls, then close the database. Twice is fine."""
        await asyncio.to_thread(self._pool.shutdown)
        await asyncio.to_thread(self.db.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # ------------------------------------------------------------------ inside
    async def _call(
        self, work: Callable[[Call], T], say: Say = silent, undo: Callable[[T], object] = lambda result: None
    ) -> T:
        """The result of ``work`` in a thread. undo: of a result nobody waits for any more."""
        call = Call(say)
        running = self._pool.submit(work, call)
        try:
            return await asyncio.wrap_future(_shielded(running))
        except asyncio.CancelledError:
            if running.cancel():  # it had not begun
                raise
            call.stop()
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([asyncio.wrap_future(_shielded(running))])
            if running.exception() is None:
                undo(running.result())
            raise

    async def _each(self, chunks: Any) -> AsyncIterator[Chunk]:
        try:
            while (chunk := await self._call(lambda call: next(chunks, None))) is not None:
                yield chunk
        finally:
            chunks.close()


class _Stop(StoppingCriteria):
    """Ends generating when the task that waits was cancelled."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._call.stopped, device=input_ids.device)


def _shielded(running: "Future[T]") -> "Future[T]":
    """A future with the same result, whose cancelling cancels nothing."""
    outer: Future[T] = Future()
    outer.set_running_or_notify_cancel()

    def done(inner: "Future[T]") -> None:
        if inner.cancelled():
            outer.set_exception(asyncio.CancelledError())
        elif (error := inner.exception()) is not None:
            outer.set_exception(error)
        else:
            outer.set_result(inner.result())

    running.add_done_callback(done)
    return outer
