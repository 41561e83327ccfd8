import sysconfig
from pathlib import Path

import numpy as np
import pytest

from alaya_tiers.errors import AlayaError
from alaya_tiers.tools.corpus import UNKNOWN, CorpusError, WordTokenizer, passages, read_text, stdlib_text


@pytest.fixture(scope="module")
def code() -> str:
    return stdlib_text(limit_bytes=400_000)


def count_of(window: list[int], ids: list[int]) -> int:
    """The oracle: occurrences found one position after the other."""
    return sum(ids[start : start + len(window)] == window for start in range(len(ids) - len(window) + 1))


def test_the_standard_library_is_text_of_the_wanted_size_and_always_the_same(code: str) -> None:
    assert 399_990 <= len(code.encode()) <= 400_000
    assert code == stdlib_text(limit_bytes=400_000)
    assert stdlib_text(limit_bytes=1000) == code.encode()[:1000].decode(errors="ignore")


def test_the_standard_library_leaves_out_tests_and_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.py", "a.py", "z/c.py", "site-packages/no.py", "z/tests/no.py", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert stdlib_text() == "# a.py\n# b.py\n# z/c.py\n"


def test_a_python_without_sources_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match="no text in"):
        stdlib_text()


def test_a_book_is_read_as_utf8_and_bad_bytes_are_replaced(tmp_path: Path) -> None:
    book = tmp_path / "book.md"
    book.write_bytes("\ufeffGrüße, ".encode() + b"\xff" + "мир\r\n".encode())
    assert read_text(book) == f"Grüße, {UNKNOWN}мир\r\n"


def test_a_missing_or_blank_book_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(AlayaError, match="cannot read"):
        read_text(tmp_path / "missing.md")
    (tmp_path / "blank.md").write_text(" \n\t")
    with pytest.raises(CorpusError, match="no text in"):
        read_text(tmp_path / "blank.md")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    if x:\n\n\t\treturn  'é — 日本語' # ÿ\r\n",
        "\n\n  leading, trailing  \t \n ",
        "e\u0301 combining \U0001f600\U0001f468\u200d\U0001f469 emoji\u00a0no-break\u2028line \x00 \x1c",
        "=" * 70 + "...!?  __init__ 3.14 a_b",
    ],
)
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = WordTokenizer.fit(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_code_survives_the_tokenizer(code: str) -> None:
    tokenizer = WordTokenizer.fit(code)
    ids = tokenizer.encode(code)
    assert tokenizer.decode(ids) == code
    assert 0 < min(ids) < max(ids) < tokenizer.vocabulary_size
    assert len(ids) < len(code) / 3


def test_a_line_break_with_its_indentation_is_one_token() -> None:
    text = "if a:\n        return b\n"
    tokenizer = WordTokenizer.fit(text)
    assert tokenizer.tokens[1:] == ("if", " a", ":", "\n        ", "return", " b", "\n")


def test_an_unknown_word_prints_as_the_replacement_character() -> None:
    tokenizer = WordTokenizer.fit("call me Ishmael")
    assert tokenizer.encode("call me Ahab") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 0]) == f"call me{UNKNOWN}"


def test_nothing_to_fit_is_a_typed_error() -> None:
    with pytest.raises(CorpusError, match="empty"):
        WordTokenizer.fit("")


def test_every_window_of_a_passage_occurs_once(code: str) -> None:
    ids = WordTokenizer.fit(code).encode(code)[:5000]
    found = passages(ids, 12, 10, 6, suffix=5, seed=3)
    assert len(found.items) == 12
    for passage in found.items:
        words = [*passage.prompt, *passage.answer]
        assert words == ids[passage.start : passage.start + 16]
        assert len(passage.prompt) == 10
        for end in range(10, 16):
            assert count_of(words[end - 5 : end], ids) == 1


@pytest.mark.parametrize("suffix", range(1, 10))
def test_the_share_counts_the_starts_that_qualify(suffix: int) -> None:
    ids = np.random.default_rng(suffix).integers(0, 2 + suffix % 3, 300).tolist()
    ids[:250:5] = range(100, 150)
    starts = range(300 - 12 + 1)
    qualify = [
        all(count_of(ids[end - suffix : end], ids) == 1 for end in range(start + 9, start + 12)) for start in starts
    ]
    if not any(qualify):
        with pytest.raises(CorpusError, match="only 0 of 289 starts"):
            passages(ids, 1, 9, 3, suffix=suffix)
        return
    found = passages(ids, sum(qualify), 9, 3, suffix=suffix)
    assert [item.start for item in found.items] == [start for start in starts if qualify[start]]
    assert found.qualifying_share == sum(qualify) / len(qualify)


def test_passages_come_from_the_whole_text(code: str) -> None:
    ids = WordTokenizer.fit(code).encode(code)
    starts = [item.start for item in passages(ids, 20, 16, 12, suffix=8).items]
    assert starts == sorted(set(starts))
    assert starts[0] < len(ids) * 0.15
    assert starts[-1] > len(ids) * 0.85
    assert max(np.diff(starts)) < len(ids) * 0.25


def test_passages_follow_the_seed() -> None:
    ids = list(range(1000))
    assert passages(ids, 5, 8, 4, suffix=8, seed=1) == passages(np.array(ids), 5, 8, 4, suffix=8, seed=1)
    assert passages(ids, 5, 8, 4, suffix=8, seed=1) != passages(ids, 5, 8, 4, suffix=8, seed=2)
    assert passages(ids, 5, 8, 4, suffix=8).qualifying_share == 1.0


def test_a_repeated_text_has_no_passages() -> None:
    with pytest.raises(CorpusError, match="only 0 of"):
        passages([7] * 200, 1, 8, 4, suffix=8)


def test_a_short_text_is_a_typed_error() -> None:
    with pytest.raises(CorpusError, match="11 tokens is shorter than a passage of 12"):
        passages(list(range(11)), 1, 8, 4, suffix=8)
    assert passages(list(range(12)), 1, 8, 4, suffix=8).items[0].start == 0
    with pytest.raises(CorpusError, match="only 1 of 1 starts"):
        passages(list(range(12)), 2, 8, 4, suffix=8)


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(AlayaError, match="must be positive"):
        passages(list(range(100)), 0, 8, 4, suffix=8)
    with pytest.raises(ValueError, match="does not hold the 8 tokens"):
        passages(list(range(100)), 1, 7, 4, suffix=8)
