"""What an engine did so far, for whoever asks: the caller, a live view in another thread, a scrape."""

from dataclasses import replace

from alaya_tiers.engine import Engine
from alaya_tiers.pace import Steps
from alaya_tiers.stats import Queues, Stats, TierUse


def observe(engine: Engine, tokens: int, kv_bytes: int) -> Stats:
    """All that is counted. tokens, kv_bytes: of whose numbers these are. Any thread may ask at any moment."""
    books, traffic, steps, wear = engine.accountant, engine.traffic, engine.steps, engine.wear
    return Stats(
        tokens=tokens,
        kv_bytes=kv_bytes,
        tiers={n: TierUse(limit, engine.used_bytes(n), books.peak[n]) for n, limit in books.limits.items()},
        touched=replace(engine.touched),
        read_bytes=traffic.read_bytes,
        read_ahead_bytes=traffic.read_ahead_bytes,
        written_bytes=traffic.written_bytes,
        waited_seconds=engine.waited_seconds,
        gathered=0,
        gathered_bytes=0,
        direct_io=engine.direct_io,
        path=None if engine.store.temporary else engine.store.path,
        sparse=None if engine.sparse is None else replace(engine.sparse),
        pages=None if engine.pages is None else engine.pages.use.copy(),
        stalls=engine.stalls,
        stalled_seconds=engine.stalled_seconds,
        queues=_queues(engine),
        disk_written_bytes=wear.disk_bytes,
        write_amplification=wear.disk_bytes / wear.block_bytes if wear.block_bytes else 1.0,
        steps=Steps(steps.decoding.copy(), steps.prefill_tokens, steps.prefill_seconds),
    )


def _queues(engine: Engine) -> Queues:
    if not engine.started or engine.closed:
        return Queues()
    mover = engine.mover
    with mover.lock:
        book, slot = mover.ledger, mover.host.slot_bytes
        writing = book.writing_count()
        unsafe = book.unsafe_count()
        dirty, pinned = (unsafe - writing) * slot, book.pinned_count() * slot
        depth = 0 if engine.pages is None else mover.ssd.queue.depth
        return Queues(book.fetching_count() * slot, writing * slot, dirty, mover.waiting, pinned, depth)
