"""Calls that transformers answers with silence and a wrong text: right, or an error that says what to do."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin

from alaya_tiers import AlayaCache
from alaya_tiers.errors import InputError, ModelChanged
from alaya_tiers.hf import continuing
from alaya_tiers.hf.switch import Switched
from alaya_tiers.hf.weights import weights_sample
from tests.test_hf_modes import HYBRIDS, hybrid
from tests.tiny import SMALL, check_spilled, generate, padded, prompt, small_cache, tiny


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}], ids=["plain", "chunks", "beams"])
def test_a_context_continued_with_exactly_its_prompt(model: Any, implementation: str, options: dict[str, Any]) -> None:
    ids = prompt()
    expected = generate(model, DynamicCache(config=model.config), {"input_ids": ids}, **options)
    with small_cache(model, rows=4) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        assert torch.equal(generate(model, cache, {"input_ids": ids}, **options), expected)
        assert cache.get_seq_length() == 90 + 15
        check_spilled(cache)


def test_the_same_for_a_padded_batch(model: Any, implementation: str) -> None:
    inputs = padded(3)
    expected = generate(model, DynamicCache(config=model.config), inputs)
    with small_cache(model, rows=3) as cache, torch.no_grad():
        generate(model, cache, inputs)
        cache.crop(-15)
        assert cache.get_seq_length() == 90
        assert torch.equal(generate(model, cache, inputs), expected)


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_that_cannot_go_back_say_so(family: str) -> None:
    model, ids = hybrid(family), prompt()
    with AlayaCache.for_model(model, host_budget="64KiB", **SMALL) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(InputError, match="cannot go back"):
            generate(model, cache, {"input_ids": ids})
        assert cache.get_seq_length() == 90
        longer = torch.cat([ids, prompt(1, 3)], 1)
        got = generate(model, cache, {"input_ids": longer})
    assert torch.equal(got, generate(model, DynamicCache(config=model.config), {"input_ids": longer}))


@pytest.mark.parametrize("new", [5, 200])
def test_only_new_tokens_without_a_mask(model: Any, implementation: str, new: int) -> None:
    """Fewer or more than the cache holds: transformers would fail oddly, or drop the first ones."""
    with small_cache(model) as cache:
        generate(model, cache, {"input_ids": prompt()})
        before = cache.get_seq_length()
        question = prompt(1, new) % 50 + 3
        with pytest.raises(InputError, match=r"attention_mask of 105 \+ n ones"):
            generate(model, cache, {"input_ids": question})
        assert cache.get_seq_length() == before
        mask = torch.ones(1, before + new, dtype=torch.long)
        generate(model, cache, {"input_ids": question, "attention_mask": mask})
        assert cache.get_seq_length() == before + new + 15


def test_a_mask_of_the_wrong_length(model: Any) -> None:
    with small_cache(model) as cache:
        generate(model, cache, {"input_ids": prompt()})
        mask = torch.ones(1, 100, dtype=torch.long)
        with pytest.raises(InputError, match="speaks of 100 tokens, the cache holds 105 and 5 are new"):
            generate(model, cache, {"input_ids": prompt(1, 5), "attention_mask": mask})


def test_another_text_than_the_one_in_the_cache(model: Any) -> None:
    with small_cache(model, rows=2) as cache:
        said = generate(model, cache, {"input_ids": prompt()})
        edited = said.clone()
        edited[0, 40] += 1
        with pytest.raises(InputError, match="at position 40"):
            generate(model, cache, {"input_ids": edited})
        cache.crop(40 - cache.get_seq_length())
        expected = generate(model, DynamicCache(config=model.config), {"input_ids": edited})
        assert torch.equal(generate(model, cache, {"input_ids": edited}), expected)
        cache.reset()
        generate(model, cache, {"input_ids": prompt() % 50 + 3})


def test_what_is_known_of_the_text_follows_the_rows(model: Any) -> None:
    ids = torch.cat([prompt(), prompt() % 50 + 3])
    with small_cache(model, rows=8) as cache:
        said = generate(model, cache, {"input_ids": ids})
        cache.batch_select_indices(torch.tensor([1, 0]))
        with pytest.raises(InputError, match="differs"):
            generate(model, cache, {"input_ids": said})
        generate(model, cache, {"input_ids": said[[1, 0]]})
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices((3,))  # type: ignore[arg-type]  # tuples are what transformers' own tests pass
        assert cache.batch_size == 1
        fork = copy.deepcopy(cache)
        with pytest.raises(InputError, match="differs"):
            generate(model, fork, {"input_ids": torch.cat([said[1:], said[1:]], 1)})
        generate(model, fork, {"input_ids": torch.cat([said[:1], said], 0)[:1].repeat(1, 2)})


def test_one_row_of_known_text_stands_for_any_number(model: Any) -> None:
    with small_cache(model, rows=8) as cache, torch.no_grad():
        said = generate(model, cache, {"input_ids": prompt()})
        model(input_ids=said[:, -1:].repeat(4, 1), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 2]))
        cache.batch_repeat_interleave(2)
        with pytest.raises(InputError, match="differs"):
            generate(model, cache, {"input_ids": (said % 50 + 3).repeat(4, 2)})
        longer = torch.cat([said, prompt(1, 5)], 1).repeat(4, 1)
        assert generate(model, cache, {"input_ids": longer}).shape == (4, 127)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_parameters_of_any_dtype_have_a_digest(dtype: torch.dtype) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 5).to(dtype), requires_grad=False)

    odd = Odd()
    before = weights_sample(odd)
    assert before == weights_sample(Odd())
    odd.weight.data = torch.zeros(3, 5).to(dtype)
    assert before != weights_sample(odd)


def test_assisted_decoding_of_a_filled_cache(model: Any) -> None:
    """transformers would run the whole prompt behind what is there."""
    with small_cache(model) as cache:
        said = generate(model, cache, {"input_ids": prompt()})
        with pytest.raises(InputError, match="assisted"):
            generate(model, cache, {"input_ids": said}, prompt_lookup_num_tokens=3)
        assert cache.get_seq_length() == 105


def test_changed_weights(model: Any) -> None:
    trained = copy.deepcopy(model)
    with small_cache(trained) as cache:
        said = generate(trained, cache, {"input_ids": prompt()})
        with torch.no_grad():
            trained.model.layers[1].mlp.up_proj.weight.mul_(1.001)
        with pytest.raises(ModelChanged, match="other weights"):
            generate(trained, cache, {"input_ids": said})
        assert cache.get_seq_length() == 105
        cache.reset()
        assert generate(trained, cache, {"input_ids": prompt()}).shape == said.shape
    assert weights_sample(model) == weights_sample(pickle.loads(pickle.dumps(model)))


def test_another_dtype_or_device_or_a_batch_that_grew() -> None:
    model = tiny()
    with small_cache(model, rows=3) as cache, torch.no_grad():
        model(input_ids=prompt(2, 20), past_key_values=cache)
        with pytest.raises(InputError, match="holds 2 sequences, got 3"):
            model(input_ids=prompt(3, 1), past_key_values=cache)
        with pytest.raises(InputError, match="bfloat16"):
            model.bfloat16()(input_ids=prompt(2, 1), past_key_values=cache)
        with pytest.raises(InputError, match="meta"):
            cache.update(torch.empty(2, 2, 1, 16, device="meta"), torch.empty(2, 2, 1, 16, device="meta"), 0)
        assert [cache.get_seq_length(i) for i in range(3)] == [20, 20, 20]
        assert model.float()(input_ids=prompt(2, 1), past_key_values=cache).logits.isfinite().all()


def test_where_the_prompt_is_looked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefills ask directly or through an EncoderDecoderCache; a forward, a user and a subclass do not count."""
    seen: list[continuing.Prompt | None] = []
    original = continuing.asked

    def record() -> continuing.Prompt | None:
        seen.append(original())
        return seen[-1]

    monkeypatch.setattr(continuing, "_DEPTH", continuing._DEPTH + 1)  # record is one more frame
    monkeypatch.setattr(continuing, "asked", record)
    with small_cache(model) as cache:
        cache.get_seq_length()
        assert seen == [None]
        model(input_ids=prompt(1, 4), past_key_values=cache)
        assert set(seen) == {None}
        seen.clear()
        generate(model, cache, {"input_ids": prompt(1, 20)})
        assert sum(each is not None for each in seen) == 1
        wrapped = EncoderDecoderCache(cache, DynamicCache())
        config: Any = type("C", (), {"_mask_length": 40})()
        ids: Any = prompt(1, 40)
        with pytest.raises(Exception):  # noqa: B017, PT011 - what matters is who asked
            GenerationMixin._prefill(model, ids, config, {"past_key_values": wrapped})
        assert seen[-1] is not None
        assert seen[-1].tokens == 40


def test_a_copied_model_keeps_its_own_latent_expansion() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    model: Any = transformers.DeepseekV3ForCausalLM(config)
    model.eval()
    switched = Switched(model)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if "expand_kv" in vars(module):
            assert vars(module)["expand_kv"].__self__ is module
            break
    else:
        pytest.fail("nothing was handed on")
    switched.undo()
    assert not any("expand_kv" in vars(module) for module in model.modules())
