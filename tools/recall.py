"""Tasks of recall: token sequences in which the next token stands somewhere before, and questions about a context.

    text    a window of a book, as it is
    quote   a window of a book, then phrases of it again, each after QUOTE
    copy    phrases of random tokens, new ones and old ones in any order: nothing but the context tells what follows
    pairs   facts `KEY a b c d` in random tokens, then some of them again: `KEY a b` asks for `c d`

A row of a task comes with the positions that can be known; the others (random tokens, the words a phrase begins with)
are not learnt and not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from alaya_tiers.errors import ConfigError

Integers = npt.NDArray[np.int64]
Known = npt.NDArray[np.bool_]
Row = tuple[Integers, Known]

SPECIAL = ("<quote>", "<key>")
QUOTE, KEY = range(2)
TASKS = ("text", "quote", "copy", "pairs")

PHRASE, OPENING = 24, 4
"""Tokens of a phrase that is repeated, and how many of them say which one it is."""

FACT, ASKED = 5, 3
"""Tokens of a fact, and how many of them are its question."""


def fit_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte pairs of these texts, ``size`` of them with the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Question:
    """What follows a context: ``prompt``, then ``answer``."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tasks:
    """Rows and questions of every task. text: ids of books. vocabulary: number of tokens.

    alphabet: random tokens are of so many different ones; None = of all.
    """

    text: Integers
    vocabulary: int
    alphabet: int | None = None

    def row(self, task: str, n: int, rng: np.random.Generator) -> Row:
        """n tokens of a task, and which of them can be known from those before."""
        if task == "text":
            return self._window(n, rng), np.arange(n) > 0
        if task == "copy":
            return self._phrases(n, rng)
        context, questions = self.questions(task, n * 2 // 3, n, rng)
        ids, known = np.empty(n, np.int64), np.zeros(n, bool)
        at = context.size
        ids[:at], known[1:at] = context, task == "quote"
        for question in questions:
            for tokens, certain in ((question.prompt, False), (question.answer, True)):
                end = min(n, at + len(tokens))
                ids[at:end], known[at:end] = tokens[: end - at], certain
                at = end
        return ids, known

    def questions(self, task: str, n: int, count: int, rng: np.random.Generator) -> tuple[Integers, list[Question]]:
        """A context of about n tokens and ``count`` questions about it, none twice while others are left.

        text: one question, what follows in the book. Raises ConfigError where the text is too short.
        """
        if task == "text":
            window = self._window(n + count, rng)
            return window[:n], [Question((), tuple(window[n:].tolist()))]
        if task == "pairs":
            facts = self._random(n // FACT * FACT, rng).reshape(-1, FACT)
            facts[:, 0] = KEY
            asked = facts[_some(facts.shape[0], count, rng)].tolist()
            return facts.ravel(), [Question(tuple(fact[:ASKED]), tuple(fact[ASKED:])) for fact in asked]
        context = self._window(n, rng) if task == "quote" else self._random(n, rng)
        length = min(PHRASE, n // 2)
        phrases = [context[start : start + length].tolist() for start in _some(n - length, count, rng)]
        return context, [Question((QUOTE, *p[:OPENING]), tuple(p[OPENING:])) for p in phrases]

    def _phrases(self, n: int, rng: np.random.Generator) -> Row:
        """A third of n tokens in new phrases of 2 to 16; before and after each, old ones."""
        fresh, phrases, used = self._random(n // 3, rng), list[Integers](), 0
        ids, known, at = np.empty(n, np.int64), np.zeros(n, bool), 0
        while at < n:
            again = used == fresh.size or (bool(phrases) and rng.random() < 0.5)
            if again:
                phrase = phrases[int(rng.integers(len(phrases)))]
            else:
                phrase = fresh[used : used + int(rng.integers(2, 17))]
                phrases.append(phrase)
                used += phrase.size
            end = min(n, at + phrase.size)
            ids[at:end], known[at + 1 : end] = phrase[: end - at], again
            at = end
        return ids, known

    def _window(self, n: int, rng: np.random.Generator) -> Integers:
        if n >= self.text.size:
            raise ConfigError(f"the text has {self.text.size} tokens, fewer than the {n} asked for: give a longer one")
        start = int(rng.integers(self.text.size - n))
        return self.text[start : start + n]

    def _random(self, n: int, rng: np.random.Generator) -> Integers:
        """Random tokens, none twice before all were there."""
        last = self.vocabulary if self.alphabet is None else min(self.vocabulary, len(SPECIAL) + self.alphabet)
        return len(SPECIAL) + _some(last - len(SPECIAL), n, rng)


def _some(n: int, count: int, rng: np.random.Generator) -> Integers:
    """count numbers below n, none twice before all were there."""
    return np.concatenate([rng.permutation(n) for _ in range(-(-count // n))] or [np.empty(0, np.int64)])[:count]
