"""A tiny model and a cache with budgets at the floor: a context of more than a few blocks is in all three tiers."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alaya_tiers import AlayaCache

BLOCK = 8
SMALL: dict[str, Any] = {
    "block_tokens": BLOCK,
    "segment_tokens": 4 * BLOCK,
    "io": "buffered",
}


def tiny(**changes: Any) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | changes
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def small_cache(model: PreTrainedModel, rows: int = 1, **changes: Any) -> AlayaCache:
    """Budgets at the floor: a context of more than a few blocks is in all three tiers."""
    config = model.config
    heads, slot = config.num_key_value_heads, 4096
    device = (config.num_hidden_layers * rows + 1) * heads * slot
    settings = {"device_budget": device, "host_budget": 8 * heads * slot} | SMALL | changes
    return AlayaCache(config=config, **settings)


def prompt(rows: int = 1, n: int = 90) -> Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(7))


def padded(rows: int, n: int = 90) -> dict[str, Tensor]:
    ids, mask = prompt(rows, n), torch.ones(rows, n, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : 17 * row] = 0
        ids[row, : 17 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    torch.manual_seed(3)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, **kwargs)
    assert isinstance(out, Tensor)
    return out


def check_spilled(cache: AlayaCache) -> None:
    """The run was what the test is about: something in every tier, no budget exceeded, the books in order."""
    stats = cache.stats()
    assert stats.read_bytes > 0
    assert all(use.used > 0 for use in stats.tiers.values())
    for use in stats.tiers.values():
        assert use.budget is None or use.peak <= use.budget
    cache.session.engine.mover.ledger.check_integrity()
    assert cache.session.engine.mover.ledger.pinned_count() == 0
