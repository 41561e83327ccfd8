"""Every causal LM class of transformers: the tokens of DynamicCache, or a refusal; docs/compatibility.md says which."""

import os
import warnings
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from alaya_tiers import AlayaCache, GatheredWarning
from alaya_tiers.hf import handles
from alaya_tiers.tools.census import MODES, TOLERANCE, WORDS, Family, NotComparable, _generate, families


def _names(*lines: str) -> set[str]:
    return set(" ".join(lines).split())


NOT_COMPARABLE = _names(
    "blt emu3 falcon_mamba gemma3n gemma4_assistant gemma4_unified_assistant mamba mamba2 minimax musicgen",
    "musicgen_melody openai-gpt reformer rwkv xlm xlnet xlstm",
)
"""No small config, or no DynamicCache; the table says why."""

SLOW = _names(
    "big_bird bloom codegen cpmant gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp prophetnet",
    "rembert roformer trocr xglm",  # no attention interface
    "diffllama doge jetmoe mllama",  # change or read keys or values between cache and attention
    "git minimax_m3_vl_text",  # keep their own attention
)
"""Fall back in alaya mode: exact, but all keys and values are gathered. Nothing else may."""

OWN_WAYS = {
    "axk2": "DSA",
    "deepseek_v32": "DSA",
    "deepseek_v4": "compressed and heavily compressed attention",
    "dots3_note_text": "DSA",
    "glm_moe_dsa": "DSA",
    "hy_v4": "DSA",
    "minimax_m3_vl_text": "MSA",
    "git": "adds a mask of numbers to the scores",
    "inkling2_text": "tells layers apart by its own means, and none of them is tiered",
}
"""Never switched, and refused when someone switches them by hand."""

QUICK = _names(
    "llama gpt2 gpt_bigcode mistral",  # grouped, multi-head, multi-query attention
    "gemma2 gpt_oss mimo_v2_flash",  # soft cap, sinks, values of another width
    "gemma3_text llama4_text modernbert-decoder",  # sliding, chunked, bidirectional relatives
    "gemma3n_text gemma4_text",  # layers that share keys and values
    "deepseek_v2 deepseek_v3 minicpm3",  # MLA
    "bailing_hybrid jamba lfm2 qwen3_next inkling_text zamba2",  # beside linear attention and convolutions
    "bart bert",  # decoders of encoder-decoders, encoders as decoders
    "bloom falcon diffllama doge jetmoe mllama",  # without the interface, or looking inside
    "gemma3 got_ocr2 git",  # text parts of larger models
    "deepseek_v32 deepseek_v4 minimax_m3_vl_text qwen4_exp_text",  # own sparse attention
)
"""One or two families for each way of attending; the others run with ALAYA_CENSUS=1."""

ALL_FAMILIES = pytest.mark.skipif("ALAYA_CENSUS" not in os.environ, reason="ALAYA_CENSUS=1 runs all families (10 min)")
ALL = families()
COMPARABLE = sorted(set(ALL) - set(NOT_COMPARABLE))


def _family(name: str) -> ParameterSet:
    return pytest.param(name, marks=[] if name in QUICK else [ALL_FAMILIES])


@pytest.fixture(scope="module")
def table(root: Path) -> dict[str, list[str]]:
    """The rows of docs/compatibility.md: class, alaya, stock and note of each family."""
    rows = [line for line in (root / "docs" / "compatibility.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[1:]]
    return {family: rest for family, *rest in cells}


@pytest.mark.parametrize("name", [_family(name) for name in COMPARABLE])
def test_tokens_of_dynamic_cache_or_a_refusal(name: str, table: dict[str, list[str]]) -> None:
    family = Family(name)
    assert family.sensitivity() > 100 * TOLERANCE
    alaya, stock, by_hand = (family.run(mode) for mode in MODES)
    assert stock.right, stock
    assert alaya.right, alaya
    assert (alaya.gathered > 0) == (name in SLOW), alaya
    assert by_hand.right or (by_hand.verdict, by_hand.note) == ("refused", "UnsupportedModel"), by_hand
    assert table[name][1:4] == [WORDS[o.verdict] for o in (alaya, stock, by_hand)], "generate docs/compatibility.md"


@pytest.mark.parametrize("name", sorted(OWN_WAYS))
def test_attention_of_their_own_is_left_alone_or_refused(name: str) -> None:
    family = Family(name)
    before = family.model.config._attn_implementation
    family.cache("greedy", "alaya").close()
    assert family.model.config._attn_implementation == before
    assert family.run("by hand").verdict == "refused"


@pytest.mark.slow
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
    assert {family for family, row in table.items() if row[1] in (WORDS["slow"], WORDS["prefill"])} == set(SLOW)
    assert len(COMPARABLE) >= 50


def test_a_tiered_cache_was_used() -> None:
    family = Family("llama")
    with family.cache("greedy", "alaya") as cache:
        assert type(cache) is AlayaCache
        _generate(family.model, cache, "greedy")
        stats = cache.stats()
        assert stats.read_bytes > 0
        assert all(use.used > 0 for use in stats.tiers.values())
