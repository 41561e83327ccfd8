import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools.corpus import Passage, WordTokenizer, passages, stdlib_text
from alaya_tiers.tools.quotation import HEAD_DIM, HIGH_PAIRS, PAIRS, ROPE_THETA, Parts, build_model, text_key_values

TOKENS = 4096
SLOTS = 8


@dataclass(frozen=True, slots=True)
class Reader:
    """A model, the KV of the text it has read, and passages of that text."""

    model: Any  # LlamaForCausalLM, which does not fit the protocol that types generate()
    ids: list[int]
    cache: DynamicCache
    passages: tuple[Passage, ...]

    def continuation(self, prompt: tuple[int, ...], count: int, cache: DynamicCache | None = None) -> tuple[int, ...]:
        """What `generate` adds to text and prompt, greedily."""
        tokens = torch.tensor([[*self.ids, *prompt]])
        cache = copy.deepcopy(self.cache) if cache is None else cache
        out = self.model.generate(tokens, past_key_values=cache, max_new_tokens=count, do_sample=False)
        return tuple(out[0, tokens.shape[1] :].tolist())


def layers(cache: DynamicCache) -> list[Any]:
    """Untyped: transformers allows layers without keys and values."""
    return list(cache.layers)


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reader(two_threads: None) -> Reader:
    text = stdlib_text(limit_bytes=60_000)
    tokenizer = WordTokenizer.fit(text)
    ids = tokenizer.encode(text)[:TOKENS]
    model = build_model(tokenizer.vocabulary_size, slots=SLOTS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return Reader(model, ids, cache, passages(ids, 8, 16, 10, suffix=SLOTS).items)


def test_every_quotation_is_continued_verbatim(reader: Reader) -> None:
    assert len(reader.passages) == 8
    for passage in reader.passages:
        assert reader.continuation(passage.prompt, len(passage.answer)) == passage.answer


def test_generation_without_a_prefilled_cache_continues_too(reader: Reader) -> None:
    passage = reader.passages[5]
    short = Reader(reader.model, reader.ids[passage.start : passage.start + 200], DynamicCache(), ())
    assert short.continuation(passage.prompt, 10) == passage.answer


def test_words_that_are_not_in_the_text_are_not_continued(reader: Reader) -> None:
    passage = reader.passages[0]
    strangers = tuple(reversed(passage.prompt))
    assert reader.continuation(strangers, len(passage.answer)) != passage.answer


def test_one_lost_key_changes_the_word(reader: Reader) -> None:
    passage = reader.passages[4]
    position = passage.start + len(passage.prompt) + 3
    cache = copy.deepcopy(reader.cache)
    layers(cache)[1].keys[:, :, position] = 0.0
    told = reader.continuation(passage.prompt, len(passage.answer), cache)
    assert told[:3] == passage.answer[:3]
    assert told[3] != passage.answer[3]


def test_one_lost_value_changes_the_word(reader: Reader) -> None:
    passage = reader.passages[6]
    cache = copy.deepcopy(reader.cache)
    layers(cache)[1].values[:, :, passage.start + len(passage.prompt)] *= -1.0
    assert reader.continuation(passage.prompt, 1, cache) != passage.answer[:1]


def test_a_text_that_was_not_read_is_not_continued(reader: Reader) -> None:
    passage = reader.passages[7]
    unread = Reader(reader.model, reader.ids[: passage.start], DynamicCache(), ())
    assert unread.continuation(passage.prompt, 10) != passage.answer


@pytest.mark.parametrize("chunk_tokens", [3, 1000])
def test_the_kv_of_a_text_is_computed_in_linear_time(reader: Reader, chunk_tokens: int) -> None:
    read = 2500 if chunk_tokens > 3 else 40
    chunks = list(text_key_values(reader.model, reader.ids[:read], chunk_tokens=chunk_tokens))
    assert len(chunks) == -(-read // chunk_tokens)
    for number, layer in enumerate(layers(reader.cache)):
        keys, values = (torch.cat([chunk[number][part] for chunk in chunks], dim=2) for part in (0, 1))
        torch.testing.assert_close(keys, layer.keys[:, :, :read], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(values, layer.values[:, :, :read], atol=1e-3, rtol=1e-3)


def test_the_kv_of_a_token_is_4_kib(reader: Reader) -> None:
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers(reader.cache)]
    assert shapes == [((1, 1, TOKENS, HEAD_DIM),) * 2] * 2


def test_the_seed_decides_all_weights_and_nothing_else_changes() -> None:
    state = torch.random.get_rng_state()
    first, again, other = build_model(50), build_model(50), build_model(50, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_the_nearest_offset_is_the_hardest_to_tell() -> None:
    frequencies = ROPE_THETA ** (-torch.arange(HIGH_PAIRS, dtype=torch.float64) / PAIRS)
    gaps = torch.stack([(1 - torch.cos(f * torch.arange(1, 1 << 18))) for f in frequencies.tolist()]).sum(0)
    assert gaps.argmin() == 0
    assert gaps[SLOTS:].min() > 2 * gaps[0]


@pytest.mark.parametrize("slots", [1, 2, 5, 8, 16])
def test_parts_do_not_overlap(slots: int) -> None:
    parts = Parts(slots)
    channels = [*range(128), *(c for back in range(slots + 1) for c in range(*parts.code(back).indices(10_000)))]
    assert [*channels, parts.one] == list(range(parts.one + 1))
    assert parts.one < parts.hidden_size
    assert parts.hidden_size % slots == 0


@pytest.mark.parametrize(
    ("slots", "dtype"), [(1, torch.float32), (4, torch.float32), (16, torch.float32), (8, torch.bfloat16)]
)
def test_other_widths_and_precisions_continue_too(slots: int, dtype: torch.dtype) -> None:
    ids = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    model = build_model(400, slots=slots, dtype=dtype)
    assert Reader(model, ids, DynamicCache(), ()).continuation(tuple(ids[100:120]), 12) == tuple(ids[120:132])


@pytest.mark.parametrize(("vocabulary_size", "slots"), [(0, 8), (10, 0), (10, 17)])
def test_senseless_sizes_are_refused(vocabulary_size: int, slots: int) -> None:
    with pytest.raises(ConfigError):
        build_model(vocabulary_size, slots=slots)
