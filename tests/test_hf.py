"""Through transformers: tokens identical to DynamicCache with blocks in every tier."""

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import causal_mask_function

from alaya_tiers import AlayaCache, BudgetTooSmall, GatheredWarning
from alaya_tiers.errors import ContextTooLong, InputError, SessionClosed, StaleHandle
from alaya_tiers.hf import alaya_mask
from tests.tiny import BLOCK, SMALL, check_spilled, generate, padded, prompt, small_cache, tiny

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam_sample": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunk_1": {"prefill_chunk_size": 1, "do_sample": False},
    "chunk_7": {"prefill_chunk_size": 7, "do_sample": False},
    "chunk_64": {"prefill_chunk_size": 64, "do_sample": False},
    "chunk_512": {"prefill_chunk_size": 512, "do_sample": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_modes(model: Any, implementation: str, mode: str) -> None:
    inputs = {"input_ids": prompt(), "attention_mask": torch.ones(1, 90, dtype=torch.long)}
    expected = generate(model, DynamicCache(config=model.config), inputs, **MODES[mode])
    with small_cache(model, rows=MODES[mode].get("num_beams", 1) * 2) as cache:
        assert torch.equal(generate(model, cache, inputs, **MODES[mode]), expected)
        check_spilled(cache)


@pytest.mark.parametrize("mode", ["greedy", "sample", "beams", "chunk_7"])
def test_left_padded_batches(model: Any, implementation: str, mode: str) -> None:
    inputs = padded(3)
    expected = generate(model, DynamicCache(config=model.config), inputs, **MODES[mode])
    with small_cache(model, rows=3 * MODES[mode].get("num_beams", 1)) as cache:
        assert torch.equal(generate(model, cache, inputs, **MODES[mode]), expected)
        check_spilled(cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    model.set_attn_implementation("alaya")
    with small_cache(model) as cache, torch.no_grad():
        reference = DynamicCache(config=model.config)
        for start in range(0, 90, 30):
            chunk = prompt()[:, start : start + 30]
            got = model(input_ids=chunk, past_key_values=cache).logits.double()
            model.set_attn_implementation("sdpa")
            want = model(input_ids=chunk, past_key_values=reference).logits.double()
            model.set_attn_implementation("alaya")
            tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-6}[dtype]
            assert (got - want).abs().max() <= tolerance * want.abs().max()
        check_spilled(cache)


def test_several_turns_and_forks(model: Any, implementation: str) -> None:
    first = {"input_ids": prompt()}
    with small_cache(model, rows=3) as cache:
        reference: Any = DynamicCache(config=model.config)
        said = generate(model, cache, first)
        assert torch.equal(said, generate(model, reference, first))
        branch, other = copy.deepcopy(cache), copy.deepcopy(reference)
        question = torch.cat([said, prompt(1, 11)], 1)
        assert torch.equal(
            generate(model, cache, {"input_ids": question}), generate(model, reference, {"input_ids": question})
        )
        another = torch.cat([said, prompt(1, 5) + 1], 1)
        assert torch.equal(
            generate(model, branch, {"input_ids": another}), generate(model, other, {"input_ids": another})
        )
        check_spilled(cache)
        used = cache.stats().tiers["ssd"].used
        del branch
        gc.collect()
        generate(model, cache, {"input_ids": torch.cat([question, prompt(1, 90)], 1)})
        cache.flush()
        assert cache.stats().tiers["ssd"].used < used + 3 * 2 * 4096 * 24  # the branch's blocks were let go


def test_samples_from_one_stored_prompt_share_it(model: Any, implementation: str) -> None:
    """A context prefilled once, then many rows: where DynamicCache fails, the rows share its blocks."""
    ids = prompt()
    with small_cache(model, rows=4) as cache:
        model(input_ids=ids[:, :-1], past_key_values=cache)
        out = generate(model, cache, {"input_ids": ids}, num_return_sequences=3, do_sample=True)
        assert out.shape[0] == 3
        blocks = cache.session.engine.mover.ledger.alive().size // (3 * 2)  # of each layer and head
        assert blocks <= 89 // BLOCK + 3 * 5
        reference = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1].repeat(3, 1), past_key_values=reference)
        assert torch.equal(out, generate(model, reference, {"input_ids": ids.repeat(3, 1)}, do_sample=True))


@pytest.mark.parametrize("removed", [1, 3, BLOCK, BLOCK + 1, 50, 90])
def test_crop_then_go_on(model: Any, implementation: str, removed: int) -> None:
    ids = prompt()
    with small_cache(model) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 90 - removed
        got = model(input_ids=ids[:, 90 - removed :], past_key_values=cache).logits
        want = model(input_ids=ids).logits[:, 90 - removed :]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        check_spilled(cache)


def test_reset_starts_over(model: Any, implementation: str) -> None:
    inputs = {"input_ids": prompt()}
    with small_cache(model) as cache:
        first = generate(model, cache, inputs)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats().tiers["device"].used == 0
        assert torch.equal(generate(model, cache, inputs), first)


def test_masks_of_four_dimensions(model: Any, implementation: str) -> None:
    ids = prompt()
    seen = torch.rand(1, 1, 90, 90, generator=torch.Generator().manual_seed(0)) > 0.3
    seen = (seen | torch.eye(90, dtype=torch.bool)) & torch.ones(90, 90, dtype=torch.bool).tril()
    additive = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, additive):
        with small_cache(model) as cache, torch.no_grad():
            got = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            want = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_code_that_looks_inside_gets_the_real_tensors(model: Any) -> None:
    ids = prompt()
    reference = DynamicCache(config=model.config)
    with small_cache(model) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids, past_key_values=reference)
        for ours, theirs in zip(cache.layers, reference.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys)  # type: ignore[union-attr]
            torch.testing.assert_close(ours.values, theirs.values)  # type: ignore[union-attr]
        assert cache.stats().gathered > 0
        k, _ = cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
        with pytest.warns(GatheredWarning, match="looked inside"):
            assert k.cos().shape == (1, 2, 91, 16)
        cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
        with pytest.raises(StaleHandle):
            k.clone()


FAMILIES: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "qwen3": lambda: ("Qwen3", {"head_dim": 16}),
    "mistral (sliding window)": lambda: ("Mistral", {"head_dim": 16, "sliding_window": 16}),
    "gemma2 (soft cap, hybrid)": lambda: ("Gemma2", {"head_dim": 16, "sliding_window": 16}),
    "gemma3 (hybrid)": lambda: ("Gemma3Text", {"head_dim": 16, "sliding_window": 16}),
    "gpt_neox (rotary on a part)": lambda: ("GPTNeoX", {}),
    "gpt_oss (sinks, hybrid)": lambda: (
        "GptOss",
        {"head_dim": 16, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": lambda: ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "bloom (no attention interface)": lambda: ("Bloom", {"n_layer": 3, "n_head": 4}),
    "cohere2 (sliding window)": lambda: ("Cohere2", {"sliding_window": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families(family: str) -> None:
    name, extra = FAMILIES[family]()
    base = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    known = {"GPT2": {}, "Bloom": {}}.get(name, base)
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "hidden_size": 64}
        | known
        | extra
    )
    name = {"Gemma3Text": "Gemma3"}.get(name, name)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).eval()
    for inputs, kwargs in (({"input_ids": prompt()}, {}), (padded(2), {}), (padded(2), MODES["beams"])):
        model.set_attn_implementation("eager") if name in ("GptOss", "Gemma2") else None
        expected = generate(model, DynamicCache(config=config), inputs, **kwargs)
        with warnings.catch_warnings():
            if name == "Bloom":
                warnings.simplefilter("ignore", GatheredWarning)
            sizes = {"device_budget": "2MiB", "host_budget": 12 * 4 * 4096} | SMALL
            with AlayaCache.for_model(model, **sizes) as cache:
                assert torch.equal(generate(model, cache, inputs, **kwargs), expected)
                assert cache.stats().gathered == 0 or name == "Bloom"


def test_real_weights(shared_data: Path) -> None:
    for name, n in (("stories260K", 400), ("tiny1m", 200)):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(shared_data / "models" / name).eval()
        ids = torch.randint(3, 500, (1, n), generator=torch.Generator().manual_seed(0))
        expected = generate(model, DynamicCache(config=model.config), {"input_ids": ids}, do_sample=False)
        heads = model.config.num_key_value_heads
        sizes = {"device_budget": (model.config.num_hidden_layers + 1) * heads * 4096 * 2} | SMALL
        with AlayaCache.for_model(model, host_budget=4 * heads * 4096 * 2, **sizes) as cache:
            assert torch.equal(generate(model, cache, {"input_ids": ids}, do_sample=False), expected)
            check_spilled(cache)


def test_more_tokens_than_positions(model: Any) -> None:
    with small_cache(model) as cache, torch.no_grad():
        with pytest.raises(ContextTooLong, match="512 positions"):
            model(input_ids=prompt(1, 513), past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(input_ids=prompt(1, 20), past_key_values=cache)
        with pytest.raises(ContextTooLong, match="max_tokens"):
            model(input_ids=prompt(1, 493), past_key_values=cache)
        assert [cache.get_seq_length(i) for i in range(3)] == [20, 20, 20]
        assert model(input_ids=prompt(1, 1), past_key_values=cache).logits.isfinite().all()
    with small_cache(model, max_tokens=None) as cache, torch.no_grad():
        model(input_ids=prompt(1, 513), past_key_values=cache)


def test_budgets_below_the_floor_name_the_smallest_that_works(model: Any) -> None:
    for tier in ("device_budget", "host_budget"):
        with small_cache(model, **{tier: 4096}) as cache, pytest.raises(BudgetTooSmall) as caught:
            generate(model, cache, {"input_ids": prompt()})
        for _ in range(4):  # the working set is known layer by layer
            with small_cache(model, **{tier: caught.value.smallest}) as cache:
                try:
                    generate(model, cache, {"input_ids": prompt()})
                    break
                except BudgetTooSmall as error:
                    caught.value.smallest = error.smallest
        else:
            pytest.fail("the named budget never worked")


def test_wrong_shapes_are_refused_and_change_nothing(model: Any) -> None:
    with small_cache(model) as cache:
        cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
        for k in (torch.randn(1, 3, 1, 16), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 16).bfloat16()):
            with pytest.raises(InputError):
                cache.update(k, k, 0)
        cache.batch_repeat_interleave(2)
        with pytest.raises(InputError, match="2 sequences"):
            cache.update(torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 16), 0)
        with pytest.raises(InputError, match="negative"):
            cache.crop(3)
        assert cache.get_seq_length() == 5


def test_a_closed_cache_says_so(model: Any) -> None:
    cache = small_cache(model)
    generate(model, cache, {"input_ids": prompt()})
    path = Path(cache.session.engine.store.path)
    assert path.exists()
    cache.close()
    cache.close()
    assert not path.exists()
    with pytest.raises(SessionClosed):
        model(input_ids=prompt(1, 1), past_key_values=cache)


def test_a_forgotten_cache_cleans_up_after_itself(model: Any) -> None:
    cache = small_cache(model)
    generate(model, cache, {"input_ids": prompt()})
    path = Path(cache.session.engine.store.path)
    del cache
    gc.collect()
    assert not path.exists()


def test_a_dropped_fork_lets_go_at_once(model: Any) -> None:
    """Without the help of the cyclic garbage collector: forks are made in loops, device slots are few."""
    for config in (model.config, None):
        with small_cache(model) as cache:
            if config is None:
                cache = AlayaCache(device_budget=8 * 4096, host_budget=32 * 4096, **SMALL)
            for layer in range(3):
                cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), layer)
            gc.disable()
            try:
                for _ in range(5):
                    fork = copy.deepcopy(cache)
                    for layer in range(3):
                        fork.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), layer)
                    del fork
            finally:
                gc.enable()
            assert cache.get_seq_length() == 20
            cache.close()


def test_a_static_cache_beside_our_attention() -> None:
    """Its length is a tensor that it changes in place: our mask must have been told the old one."""
    model = tiny()
    ids = prompt(1, 20)
    with torch.no_grad():
        want = model(
            input_ids=ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=32)
        ).logits
        model.set_attn_implementation("alaya")
        got = model(
            input_ids=ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=32)
        ).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_compiled_static_cache_gets_real_masks() -> None:
    """generate makes them before the compiled forward; one of ours would be compiled anew in every step."""
    spec = alaya_mask(
        batch_size=1, q_length=3, kv_length=8, q_offset=2, mask_function=causal_mask_function, attention_mask=None
    )
    real = spec.contiguous()
    assert type(real) is Tensor
    assert real[0, 0].tolist() == [[i <= j for i in range(8)] for j in range(2, 5)]
