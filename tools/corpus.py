"""Real text for tests and demos: sources, a word tokenizer, and passages that can be continued in one way only."""

import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alaya_tiers.errors import ConfigError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
TOKEN = re.compile(r" ?\w+| ?([^\w\s])\1*|\s+")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"

Integers = npt.NDArray[np.int64]


class CorpusError(ConfigError):
    """A text cannot be read, or is too short or too repetitive for what was asked of it."""


def stdlib_text(limit_bytes: int = 4_000_000) -> str:
    """The source of the running Python's standard library, the same on every call: a text that every machine has.

    Files come by name, those of a folder before its subfolders, without tests and installed packages, and are cut
    after `limit_bytes` bytes of UTF-8; 4 MB are about 900,000 tokens of a `WordTokenizer`. Raises CorpusError if there
    is no source to read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[bytes] = []
    missing = limit_bytes
    for path in source_files(root):
        if missing <= 0:
            break
        piece = read_bytes(path).decode("utf-8", errors="replace").encode()[:missing]
        pieces.append(piece)
        missing -= len(piece)
    return not_empty(b"".join(pieces).decode("utf-8", errors="ignore"), root)


def source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, bad bytes replaced. Raises CorpusError if it cannot be read or is blank."""
    return not_empty(read_bytes(Path(path)).decode("utf-8-sig", errors="replace"), Path(path))


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error


def not_empty(text: str, source: Path) -> str:
    if not text.strip():
        raise CorpusError(f"no text in {source}")
    return text


@dataclass(frozen=True, slots=True)
class WordTokenizer:
    """Words with the space before them, runs of one punctuation mark, and runs of white space are a token each.

    A line break with the indentation after it is one token. `decode(encode(text)) == text` for every text made of
    known tokens; an unknown token becomes id 0, which prints as the Unicode replacement character.
    """

    tokens: tuple[str, ...]
    ids: dict[str, int]

    @classmethod
    def fit(cls, text: str) -> "WordTokenizer":
        """Know the tokens of `text`, numbered by first appearance from 1. Raises CorpusError if there are none."""
        found = dict.fromkeys(split(text))
        found.pop(UNKNOWN, None)
        if not found:
            raise CorpusError("cannot fit a tokenizer to an empty text")
        tokens = (UNKNOWN, *found)
        return cls(tokens, {token: number for number, token in enumerate(tokens)})

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(token, 0) for token in split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Raises IndexError for an id outside the vocabulary."""
        return "".join(self.tokens[number] for number in ids)


def split(text: str) -> Iterator[str]:
    """The tokens of `text`; joined they are `text` again, since TOKEN matches any character."""
    return (match[0] for match in TOKEN.finditer(text))


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of a text from `start` on: a prompt, and the answer that follows it there."""

    start: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Passages:
    """Chosen passages by start, and the share of all possible starts that would have qualified (0 to 1)."""

    items: tuple[Passage, ...]
    qualifying_share: float


def passages(
    ids: Sequence[int] | Integers, count: int, prompt_tokens: int, answer_tokens: int, *, suffix: int, seed: int = 0
) -> Passages:
    """Choose `count` passages, spread over the whole text, that a model which matches `suffix` tokens can continue.

    A passage qualifies if each answer token is fixed by what precedes it: the `suffix` tokens before it occur nowhere
    else in `ids`. The qualifying starts are cut into `count` runs of equal size, and each run gives one passage at
    random. A million tokens take about half a second. Raises ConfigError for counts below 1 or a prompt shorter than
    `suffix`, and CorpusError if the text is too short or has fewer than `count` qualifying starts.
    """
    if min(count, answer_tokens, suffix) < 1:
        raise ConfigError(f"count, answer_tokens and suffix must be positive: {count}, {answer_tokens}, {suffix}")
    if prompt_tokens < suffix:
        raise ConfigError(f"a prompt of {prompt_tokens} tokens does not hold the {suffix} tokens to match")
    text = np.asarray(ids, dtype=np.int64)
    length = prompt_tokens + answer_tokens
    if len(text) < length:
        raise CorpusError(f"a text of {len(text)} tokens is shorter than a passage of {length}")
    fixed = all_of_each_run(occurs_once(text, suffix)[prompt_tokens - suffix : -1], answer_tokens)
    starts = np.flatnonzero(fixed)
    if len(starts) < count:
        raise CorpusError(f"only {len(starts)} of {len(fixed)} starts can be continued in one way; {count} were wanted")
    generator = np.random.default_rng(seed)
    chosen = [int(generator.choice(run)) for run in np.array_split(starts, count)]
    items = tuple(cut_passage(text, start, prompt_tokens, length) for start in chosen)
    return Passages(items, len(starts) / len(fixed))


def cut_passage(text: Integers, start: int, prompt_tokens: int, length: int) -> Passage:
    words = text[start : start + length].tolist()
    return Passage(start, tuple(words[:prompt_tokens]), tuple(words[prompt_tokens:]))


def occurs_once(text: Integers, width: int) -> npt.NDArray[np.bool_]:
    """For each window of `width` tokens whether it occurs nowhere else: (len(text) - width + 1,).

    Exact, without hashing: equal windows get equal numbers, and two overlapping windows numbered so make a longer one.
    """
    numbers = np.unique(text, return_inverse=True)[1]
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        pairs = numbers[:-step] * (numbers.max() + 1) + numbers[step:]
        numbers = np.unique(pairs, return_inverse=True)[1]
        covered += step
    once: npt.NDArray[np.bool_] = np.bincount(numbers)[numbers] == 1
    return once


def all_of_each_run(flags: npt.NDArray[np.bool_], length: int) -> npt.NDArray[np.bool_]:
    """For each run of `length` flags whether all are set: (len(flags) - length + 1,)."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    every: npt.NDArray[np.bool_] = sums[length:] - sums[:-length] == length
    return every
