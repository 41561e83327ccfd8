"""What contexts are stored in and handed over in: parts of a session, chunks of keys and values."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from alaya_tiers.adopted import Held
from alaya_tiers.blocks import PAGE, round_up
from alaya_tiers.cache import Session
from alaya_tiers.errors import InputError
from alaya_tiers.identity import Tokens, segment_name

Chunk = Sequence[tuple[Tensor, Tensor]]
"""K [rows, kv_heads, n, k_dim] and V [rows, kv_heads, n, v_dim] of the same n tokens, layer by layer."""

Say = Callable[[int, int], None]
"""Told how much is done, of how much."""


def silent(done: int, all_of_it: int) -> None:
    """Says nothing."""


class Part(NamedTuple):
    """Tokens of one row of a session that make up a segment. before: the name of the segment before them."""

    name: str
    row: int
    before: str
    start: int
    tokens: Tokens


def parts_of(row: int, root: str, tokens: Tokens, segment_tokens: int) -> list[Part]:
    """All tokens of a row, cut into segments."""
    found, before = list[Part](), root
    for start in range(0, tokens.size, segment_tokens):
        some = tokens[start : start + segment_tokens]
        found.append(Part(segment_name(before, some), row, before, start, some))
        before = found[-1].name
    return found


def held_by(session: Session, part: Part) -> Held:
    """The blocks of a segment, layer by layer."""
    found = []
    for _, state in sorted(session.layers.items()):
        size, end = state.shape.tokens, part.start + part.tokens.size
        first = state.rows[part.row].first[part.start // size : -(-end // size)]
        found.append((first.copy(), state.shape.geometry.kv_heads))
    return found


def cut(chunks: Iterable[Chunk], every: int) -> Iterator[Chunk]:
    """The same tokens in chunks none of which goes across a multiple of ``every``."""
    done = 0
    for chunk in chunks:
        size, at = length_of(chunk), 0
        while at < size:
            end = min(size, at + every - done % every)
            yield [(k[:, :, at:end], v[:, :, at:end]) for k, v in chunk]
            done, at = done + end - at, end


def stored_bytes(chunk: Chunk, tokens: int, block_tokens: int) -> int:
    """What so many tokens like these take on disk."""
    rows = [(k.shape[1], (k.shape[3] + v.shape[3]) * k.element_size()) for k, v in chunk]
    return sum(heads * -(-tokens // block_tokens) * round_up(block_tokens * row, PAGE) for heads, row in rows)


def length_of(chunk: Chunk) -> int:
    """How many tokens a chunk has, in every layer."""
    sizes = {x.shape[2] for pair in chunk for x in pair if x.ndim == 4}
    if len(sizes) != 1 or any(x.ndim != 4 or x.shape[0] != 1 for pair in chunk for x in pair):
        raise InputError("a chunk is, for each layer, keys and values [1, kv_heads, n, dim] of the same n tokens")
    return int(sizes.pop())
