"""Segments that follow the same one, in the order of their tokens.

Whoever has most first tokens in common with a prompt stands next to where the prompt would stand, so that finding it
reads the tokens of a few, however many there are.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.identity import Tokens, common


class Siblings:
    """Names, in order. tokens_of: the token ids of one; it may raise StoreCorrupt.

    ordered: whether the names are given in order; else all their tokens are read when the first is looked for. Names
    in a wrong order make ``nearest`` find less, never anything else.
    """

    def __init__(self, names: Iterable[str], tokens_of: Callable[[str], Tokens], *, ordered: bool = True) -> None:
        self._names, self._tokens_of, self._ordered = list(names), tokens_of, ordered
        self.unread = list[str]()
        """Those whose tokens could not be read; they are in no order."""

    def __iter__(self) -> Iterator[str]:
        """All of them, those that cannot be read last."""
        if not self._ordered:
            self._sort()
        return iter(self._names + self.unread)

    def __len__(self) -> int:
        return len(self._names) + len(self.unread)

    def copy(self) -> "Siblings":
        """The same, to be changed."""
        made = Siblings(self._names, self._tokens_of, ordered=self._ordered)
        made.unread = list(self.unread)
        return made

    def add(self, name: str) -> None:
        """One more, or one that can be read again."""
        if name in self.unread:
            self.unread.remove(name)
        try:
            place = self._place(_key(self._tokens_of(name)))
        except StoreCorrupt:
            self.unread.append(name)
            return
        if self._names[place : place + 1] != [name] and name not in self._names:
            self._names.insert(place, name)

    def remove(self, name: str) -> None:
        """One less."""
        (self._names if name in self._names else self.unread).remove(name)

    def nearest(self, tokens: Tokens) -> Iterator[tuple[str, int]]:
        """Names, and how many first tokens they have in common with these; never more than the one before had."""
        place = self._place(_key(tokens))
        sides = [self._going(reversed(self._names[:place]), tokens), self._going(self._names[place:], tokens)]
        heads = [next(side, None) for side in sides]
        while any(heads):
            side = max((0, 1), key=lambda i: -1 if (head := heads[i]) is None else head[1])
            if (head := heads[side]) is not None:
                yield head
            heads[side] = next(sides[side], None)

    def _going(self, names: Iterable[str], tokens: Tokens) -> Iterator[tuple[str, int]]:
        for name in names:
            try:
                yield name, common(self._tokens_of(name), tokens)
            except StoreCorrupt:
                self._lose(name)

    def _place(self, key: bytes) -> int:
        """Where tokens are, or would be."""
        if not self._ordered:
            self._sort()
        while True:
            asked = ""

            def key_of(name: str) -> bytes:
                nonlocal asked
                asked = name
                return _key(self._tokens_of(name))

            try:
                return bisect_left(self._names, key, key=key_of)
            except StoreCorrupt:
                self._lose(asked)

    def _lose(self, name: str) -> None:
        self._names.remove(name)
        self.unread.append(name)

    def _sort(self) -> None:
        self._ordered = True
        if len(self._names) < 2:
            return
        names, self._names = self._names, []
        keys = dict[str, bytes]()
        for name in names:
            try:
                keys[name] = _key(self._tokens_of(name))
            except StoreCorrupt:
                self.unread.append(name)
        self._names = sorted(keys, key=lambda name: keys[name])


def _key(tokens: Tokens) -> bytes:
    """Sorts so that those with more first tokens in common are closer together."""
    return tokens.astype("<i8").tobytes()
