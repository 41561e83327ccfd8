"""Every causal LM class of transformers: the tokens of DynamicCache, or a refusal; docs/compatibility.md says which."""

import warnings
from pathlib import Path

import pytest

from alaya_tiers import AlayaCache, GatheredWarning
from alaya_tiers.hf import handles
from alaya_tiers.tools.census import WORDS, Family, NotComparable, _generate, families

NOT_COMPARABLE = {
    "blt": "its config has no size of its own",
}

SLOW = {
    "bloom": "no attention interface",
}
"""Fall back in alaya mode: exact, but everything is gathered at every step. Nothing else may."""

OWN_SPARSE = {
    "axk2": "DSA",
}
"""Sparse attention of their own: never switched, and refused when someone switches them by hand."""

WRONG: dict[str, str] = {}
"""Known to differ in alaya mode, with the reason; to be empty."""

QUICK = {
    "llama": "grouped queries",
}
"""One family for each way of attending; the others are marked slow."""

ALL = families()
COMPARABLE = sorted(set(ALL) - set(NOT_COMPARABLE))


def _family(name: str) -> object:
    return pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module")
def table(root: Path) -> dict[str, list[str]]:
    """The rows of docs/compatibility.md: class, alaya, stock and note of each family."""
    rows = [line for line in (root / "docs" / "compatibility.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[1:]]
    return {family: rest for family, *rest in cells}


@pytest.mark.parametrize("name", [_family(name) for name in COMPARABLE])
def test_tokens_of_dynamic_cache_or_a_refusal(name: str, table: dict[str, list[str]]) -> None:
    family = Family(name)
    alaya, stock = family.run("alaya"), family.run("stock")
    assert stock.right, stock
    if name in WRONG:
        pytest.xfail(WRONG[name])
    assert alaya.right or (alaya.verdict, alaya.note) == ("refused", "UnsupportedModel"), alaya
    assert (alaya.verdict == "slow") == (name in SLOW), alaya
    assert table[name][1:3] == [WORDS[alaya.verdict], WORDS[stock.verdict]], "generate docs/compatibility.md again"


@pytest.mark.parametrize("name", sorted(OWN_SPARSE))
def test_sparse_attention_of_their_own_is_left_alone_or_refused(name: str) -> None:
    family = Family(name)
    before = family.model.config._attn_implementation
    family.cache("greedy", "alaya").close()
    assert family.model.config._attn_implementation == before
    by_hand = family.run("by hand")
    assert (by_hand.verdict, by_hand.note) == ("refused", "UnsupportedModel"), by_hand


@pytest.mark.parametrize("name", sorted(NOT_COMPARABLE))
def test_what_is_left_out_cannot_be_compared(name: str) -> None:
    with pytest.raises(NotComparable):
        Family(name)


def test_a_fallback_is_counted_and_each_operation_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("bloom")
    monkeypatch.setattr(handles, "_warned", set())
    counts, warned = [], []
    for _ in range(2):
        with family.cache("greedy", "alaya") as cache, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _generate(family.model, cache, "greedy")
            counts.append(cache.stats().gathered)
            warned.append([str(w.message) for w in caught if w.category is GatheredWarning])
    assert counts[0] == counts[1] > 0
    assert len(warned[0]) == len(set(warned[0])) > 0
    assert not warned[1]


def test_the_table_lists_what_was_found(table: dict[str, list[str]]) -> None:
    assert {family: row[0] for family, row in table.items()} == ALL
    assert {family for family, row in table.items() if row[1] == "–"} == set(NOT_COMPARABLE)
    assert {family for family, row in table.items() if row[1] == WORDS["slow"]} == set(SLOW)
    assert len(COMPARABLE) >= 50


def test_a_tiered_cache_was_used() -> None:
    family = Family("llama")
    with family.cache("greedy", "alaya") as cache:
        assert type(cache) is AlayaCache
        _generate(family.model, cache, "greedy")
        stats = cache.stats()
        assert stats.read_bytes > 0
        assert all(use.used > 0 for use in stats.tiers.values())
