"""Sessions that share too little memory: none of them waits while the others are served again and again.

On a virtual clock and a simulated disk, so that the figures are the same each time.
"""

import asyncio
from dataclasses import dataclass, field

import pytest

from tests.simulation import Player, Sim

SECONDS = 0.4
"""Of virtual time; a read takes about two milliseconds."""


@dataclass
class Served:
    """One session. runs: of blocks it holds. batch: runs it asks for at once. rounds: passes over all it holds."""

    runs: int
    batch: int
    rounds: int = 0
    longest: float = 0.0
    ends: list[float] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Runs of blocks it attended to."""
        return self.rounds * self.runs


def served(sessions: list[Served], host: int, seed: int) -> list[Served]:
    """What each came to, all of them attending without a pause to layer 0, which is on disk but for a few blocks."""
    sim = Sim(seed, device=4 * len(sessions) + 4, host=host)

    async def work(player: Player, one: Served) -> None:
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        while loop.time() < began + SECONDS:
            before = loop.time()
            await player.attend(0, batch=one.batch)
            one.rounds += 1
            one.longest = max(one.longest, loop.time() - before)

    async def body() -> None:
        players = []
        for one in sessions:
            players.append(Player(sim))
            for _ in range(2 * one.runs):
                await players[-1].append(0)
        await sim.mover.flush()
        await sim.settle()
        await asyncio.gather(*(work(*pair) for pair in zip(players, sessions, strict=True)))
        await sim.finish(*players)

    sim.play(body())
    return sessions


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n", [2, 4])
def test_sessions_of_one_length_go_at_one_rate(n: int, seed: int) -> None:
    found = served([Served(12, 1) for _ in range(n)], host=6, seed=seed)
    rounds = [one.rounds for one in found]
    print(rounds, [round(one.longest, 3) for one in found])
    assert min(rounds) > 3
    assert max(rounds) <= 1.3 * min(rounds) + 1, rounds
    assert max(one.longest for one in found) < 3 * SECONDS / min(rounds)


@pytest.mark.parametrize("seed", range(2))
def test_a_long_context_among_short_ones_gets_its_part(seed: int) -> None:
    """Each asks for as much at a time; the long one has to ask more often."""
    long, *short = served([Served(24, 1), *(Served(8, 1) for _ in range(3))], host=6, seed=seed)
    print([one.read for one in (long, *short)], [round(one.longest, 3) for one in (long, *short)])
    assert long.rounds > 1
    assert long.read >= 0.5 * max(one.read for one in short), [one.read for one in (long, *short)]


@pytest.mark.parametrize("seed", range(2))
def test_whoever_asks_for_much_at_once_is_not_passed_by_for_ever(seed: int) -> None:
    """A batch that takes half of the tier, against many that take a sixth of it."""
    big, *small = served([Served(12, 3), *(Served(12, 1) for _ in range(4))], host=12, seed=seed)
    print([one.read for one in (big, *small)], [round(one.longest, 3) for one in (big, *small)])
    assert big.rounds > 1
    assert big.read >= 0.5 * max(one.read for one in small), [one.read for one in (big, *small)]
