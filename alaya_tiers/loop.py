"""The one bridge from a synchronous forward to the event loop."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from alaya_tiers.errors import SessionClosed

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread of its own.

    Thread-safe. Coroutines are written once, asynchronously; synchronous callers use ``run``.
    """

    def __init__(self, name: str = "alaya-loop") -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._closing = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start ``work`` on the loop; its result comes through the future."""
        with self._closing:
            try:
                self._check()
            except SessionClosed:
                work.close()
                raise
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. Blocks; must not be called on the loop's own thread."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], object]) -> None:
        """Have the loop call ``function`` soon."""
        with self._closing:
            self._check()
            self._loop.call_soon_threadsafe(function)

    @property
    def here(self) -> bool:
        """Whether the loop runs, in this process."""
        return os.getpid() == self._pid and self._open

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Take no more work, run ``last()`` after all that was submitted, stop. Closing twice is fine."""
        with self._closing:
            if not self.here:
                return
            self._open = False
            future = asyncio.run_coroutine_threadsafe(last(), self._loop)
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise SessionClosed("this cache belongs to the process that made it; make a new one after a fork")
        if not self._open:
            raise SessionClosed("this cache is closed; make a new one")
