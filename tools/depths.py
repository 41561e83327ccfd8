"""Single pages read at random at fixed depths and at the adapted one, by turns.

python -m alaya_tiers.tools.depths DIR --pages 2048 --threads 4
"""

import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.blocks import PAGE
from alaya_tiers.depth import DEPTHS
from alaya_tiers.errors import ConfigError
from alaya_tiers.seams import Numbers, SystemClock, SystemDisk
from alaya_tiers.tiers.files import aligned
from alaya_tiers.tiers.queue import Queue
from alaya_tiers.tools.rawdisk import MIB, disk_file

ADAPTED = "adapted"

Rates = dict[str, list[float]]
"""Pages a second in each round, by depth."""


def read(pool: ThreadPoolExecutor, handle: int, places: Numbers, room: int, threads: int, queue: Queue) -> float:
    """Pages a second of one batch, read to ``room`` as the ssd tier reads it."""
    disk, share = SystemDisk(), -(-places.size // threads)
    starts = range(0, places.size, share)
    batch = queue.batch(len(starts), share)

    def job(start: int) -> None:
        some = places[start : start + share]
        n = some.size
        where = room + (start + np.arange(n)) * PAGE
        with batch.reading() as reads:
            done = disk.read_pages(np.full(n, handle, np.int32), some, np.arange(n + 1), where, PAGE, batch.depth)
            reads.n, reads.whole = n, bool((done == PAGE).all())

    began = time.perf_counter()
    list(pool.map(job, starts))
    return float(places.size / (time.perf_counter() - began))


def measure(directory: Path, nbytes: int, pages: int, threads: int, rounds: int) -> tuple[Rates, int]:
    """Rates, and the depth that adapting ended at. Raises ConfigError, OSError."""
    if min(pages, threads, rounds) < 1 or pages * PAGE > nbytes // MIB * MIB:
        raise ConfigError("--pages, --threads and --rounds must be positive, and the pages must fit into --mib")
    queues = {str(depth): Queue(SystemClock(), depth) for depth in DEPTHS} | {ADAPTED: Queue(SystemClock())}
    rates: Rates = {name: [] for name in queues}
    chance, rng = random.Random(0), np.random.default_rng(0)
    with disk_file(directory, nbytes) as file, ThreadPoolExecutor(threads) as pool:
        handle, memory = file.open(os.O_RDONLY), aligned(pages * PAGE)
        try:
            for _ in range(rounds):
                for name in chance.sample(list(queues), len(queues)):
                    places = np.sort(rng.choice(file.nbytes // PAGE, pages, replace=False)) * PAGE
                    rates[name].append(read(pool, handle, places, memory.ctypes.data, threads, queues[name]))
        finally:
            os.close(handle)
    return rates, queues[ADAPTED].depth


def command(
    directory: Path,
    mib: Annotated[int, typer.Option(help="MiB of the file to read from.")] = 1024,
    pages: Annotated[int, typer.Option(help="Pages of a batch.")] = 2048,
    threads: int = 4,
    rounds: int = 150,
) -> None:
    """Medians, the first third of the rounds left out: what adapting learns there is not counted."""
    rates, depth = measure(directory, mib * MIB, pages, threads, rounds)
    found = {name: statistics.median(some[len(some) // 3 :]) for name, some in rates.items()}
    table = Table("depth", "pages a second", "of the best")
    for name, rate in found.items():
        words = f"{name} (at the end {depth})" if name == ADAPTED else name
        table.add_row(words, f"{rate:,.0f}", f"{rate / max(found.values()):.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(command)
