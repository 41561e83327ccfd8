"""Ways to generate beyond the plain ones, each identical to DynamicCache with blocks in every tier."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache

from alaya_tiers import AlayaCache, GatheredWarning, attach
from alaya_tiers.errors import InputError
from tests.tiny import SMALL, check_spilled, generate, prompt, small_cache, tiny

HYBRIDS: dict[str, dict[str, Any]] = {
    "Gemma3Text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}


def hybrid(family: str) -> Any:
    """A model with sliding or linear layers beside two full ones."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **HYBRIDS[family],
    )
    return getattr(transformers, family.removesuffix("Text") + "ForCausalLM")(config).eval()


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("helper", ["same", "other", "early exit"])
def test_assisted_decoding(model: Any, implementation: str, helper: str, sampling: bool) -> None:
    """A draft that is always right, one that is mostly wrong, and the model's own first layer."""
    draft = {"same": tiny, "other": lambda: tiny(num_hidden_layers=1, num_attention_heads=2)}.get(helper)
    options: dict[str, Any] = {"assistant_early_exit": 1} if draft is None else {"assistant_model": draft()}
    inputs = {"input_ids": prompt()}
    expected = generate(model, DynamicCache(config=model.config), inputs, do_sample=sampling, **options)
    with small_cache(model) as cache:
        assert torch.equal(generate(model, cache, inputs, do_sample=sampling, **options), expected)
        check_spilled(cache)


def test_an_assistant_with_a_tiered_cache_of_its_own(model: Any) -> None:
    draft, inputs = tiny(num_hidden_layers=1), {"input_ids": prompt()}
    expected = generate(model, DynamicCache(config=model.config), inputs, assistant_model=draft)
    with small_cache(model) as cache, attach(draft, **SMALL, host_budget="64KiB", device_budget="64KiB"):
        assert torch.equal(generate(model, cache, inputs, assistant_model=draft), expected)


def test_embeddings_instead_of_tokens(model: Any, implementation: str) -> None:
    first = model.get_input_embeddings()(prompt()).detach()
    more = torch.cat([first, model.get_input_embeddings()(prompt(1, 30)).detach()], 1)
    with small_cache(model) as cache:
        reference: Any = DynamicCache(config=model.config)
        for embeddings in (first, more):
            got = generate(model, cache, {"inputs_embeds": embeddings})
            assert torch.equal(got, generate(model, reference, {"inputs_embeds": embeddings}))
            check_spilled(cache)
            for each in (cache, reference):  # what was generated is not part of the next embeddings
                each.crop(embeddings.shape[1] - each.get_seq_length())


@pytest.mark.parametrize("family", ["Bart", "T5"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
def test_encoder_decoders(family: str, mode: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shape = {
        "Bart": {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 256}
        | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
        "T5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    }[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=2, **shape
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.generation_config.forced_eos_token_id = None
    inputs = {"input_ids": prompt(1, 20), "decoder_input_ids": prompt(1, 60)}
    expected = generate(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), inputs, **mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GatheredWarning)
        sizes = {"device_budget": (2 * mode.get("num_beams", 1) + 1) * 4 * 4096, "host_budget": 4 * 4 * 4096}
        with AlayaCache(**sizes, **SMALL) as cache:
            got = generate(model, EncoderDecoderCache(cache, DynamicCache()), inputs, **mode)
            assert torch.equal(got, expected)
            check_spilled(cache)
        with attach(model, **sizes, **SMALL):
            assert torch.equal(generate(model, None, inputs, **mode), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward(backend: str) -> None:
    model = tiny()
    inputs = {"input_ids": prompt()}
    expected = generate(model, DynamicCache(config=model.config), inputs)
    model.set_attn_implementation("alaya")
    model.forward = torch.compile(model.forward, backend=backend)
    torch._dynamo.reset()
    with small_cache(model) as cache:
        assert torch.equal(generate(model, cache, inputs), expected)
        check_spilled(cache)
        assert cache.stats().gathered == 0
    torch._dynamo.reset()


def test_chunks_of_any_size_make_the_same_store(tmp_path: Path) -> None:
    """The same keys and values, whatever the number of tokens a forward brings: the same bytes on disk."""
    k, v = torch.randn(2, 1, 2, 96, 16), torch.randn(2, 1, 2, 96, 16)
    stores: list[dict[str, bytes]] = []
    for chunk in (1, 7, 64, 512):
        folder = tmp_path / str(chunk)
        sizes: dict[str, Any] = {"device_budget": 8 * 4096, "host_budget": 16 * 4096}
        with AlayaCache(path=folder, **sizes, **SMALL) as cache:
            for start in range(0, 96, chunk):
                for layer in range(2):
                    cache.update(k[layer, :, :, start : start + chunk], v[layer, :, :, start : start + chunk], layer)
            cache.flush()
            kept = cache.to_dynamic()
            for layer, (keys, values, *_) in enumerate(kept):
                assert torch.equal(keys, k[layer])
                assert torch.equal(values, v[layer])
            name = cache.session.engine.store.session  # a random one for each session
            stores.append(
                {
                    str(f.relative_to(folder)).replace(name, ""): f.read_bytes().replace(name.encode(), b"")
                    for f in sorted(folder.rglob("*"))
                    if f.is_file()
                }
            )
    assert any("/c/" in path for path in stores[0])
    for one, other in itertools.pairwise(stores):
        assert one == other


@pytest.mark.parametrize("family", [None, *HYBRIDS])
def test_to_dynamic_cache_and_back(family: str | None) -> None:
    model = tiny() if family is None else hybrid(family)
    ids = prompt()
    ours = {"device_budget": "1MiB", "host_budget": 16 * 4096} | SMALL
    reference: Any = DynamicCache(config=model.config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", GatheredWarning)
        model(input_ids=ids[:, :60], past_key_values=reference)
        with AlayaCache.from_dynamic(copy.deepcopy(reference), model.config, **ours) as cache:
            assert cache.get_seq_length() == 60
            there_and_back = cache.to_dynamic()
            expected = generate(model, reference, {"input_ids": ids})
            assert torch.equal(generate(model, cache, {"input_ids": ids}), expected)
            assert torch.equal(generate(model, there_and_back, {"input_ids": ids}), expected)
            plain = [type(layer).__name__ for layer in cache.to_dynamic().layers]
            assert plain == [type(layer).__name__ for layer in reference.layers]


def test_layers_as_distributed_training_gathers_them() -> None:
    """Without a config a third element makes a sliding layer, as for DynamicCache; layers may be empty."""
    k = torch.randn(1, 2, 20, 16)
    data = [(k, k, None), (None, None, None), (k, k, torch.tensor(8)), (k + 1, k, None)]
    theirs = DynamicCache(data)
    with AlayaCache(data, **SMALL) as cache:
        assert [cache.get_seq_length(i) for i in range(4)] == [theirs.get_seq_length(i) for i in range(4)]
        for (keys, values, *_), (a, b, *_) in zip(cache, theirs, strict=True):
            assert (keys is None and a is None) or torch.equal(keys, a)
            assert (values is None and b is None) or torch.equal(values, b)


def test_only_new_tokens_with_a_mask_of_all(model: Any, implementation: str) -> None:
    first, new = prompt(), prompt(1, 23) % 50 + 3
    reference: Any = DynamicCache(config=model.config)
    with small_cache(model) as cache:
        for each in (cache, reference):
            generate(model, each, {"input_ids": first})
        mask = torch.ones(1, cache.get_seq_length() + 23, dtype=torch.long)
        inputs = {"input_ids": new, "attention_mask": mask}
        assert torch.equal(generate(model, cache, inputs), generate(model, reference, inputs))
        check_spilled(cache)


def test_a_gradient_is_an_error_and_not_zero(model: Any, implementation: str) -> None:
    with small_cache(model) as cache:
        loss = model(input_ids=prompt(1, 9), past_key_values=cache).logits.sum()
        with pytest.raises(InputError, match="gradient"):
            loss.backward()
        kept: list[Tensor] = [layer.keys for layer in cache.layers]  # type: ignore[union-attr, misc]
        assert not any(tensor.requires_grad for tensor in kept)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements any operation gave back, views of the model's weights left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel, self.operation = 0, ""
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in self._weights:
                continue
            if tensor.numel() > self.numel:
                self.numel, self.operation = tensor.numel(), str(func)
        return out


def test_a_step_builds_nothing_as_long_as_the_context_but_token_ids() -> None:
    model = tiny(max_position_embeddings=8192, num_hidden_layers=2)
    model.set_attn_implementation("alaya")
    with AlayaCache(config=model.config, device_budget="1MiB", host_budget="8MiB", block_tokens=64) as cache:
        k = torch.randn(1, 2, 6000, 16)
        for layer in range(2):
            cache.update(k, k, layer)
        with _Largest(model) as largest, torch.no_grad():
            model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        assert largest.numel < 1000, largest.operation
        with _Largest(model) as largest:
            ids, mask = torch.ones(1, 1, dtype=torch.long), torch.ones(1, 6002, dtype=torch.long)
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
        assert largest.numel < 6010, largest.operation  # positions, one number a token
        assert cache.stats().gathered == 0
