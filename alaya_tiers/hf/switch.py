"""Switching a model to our attention, and back."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer

from alaya_tiers.hf.handles import KVHandle

OWN_ATTENTION = {
    "deepseek_v4",  # attends to compressed tokens, through a mask it makes itself
    "minimax_m3_vl_text",  # picks blocks of keys itself
    "git",  # its text part adds the mask to scores itself; only its vision part can be switched
}
"""Model types transformers would let us switch, to a wrong result. Found by the census (docs/compatibility.md)."""


class Switched:
    """A model whose attention is "alaya" as far as its code allows that; ``undo`` puts back what was there.

    Models with sparse attention of their own keep their attention: ours would be wrong for them. Models that keep
    compressed KV and expand it themselves (MLA) are told to hand it on as it is; attention then runs over the latents.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._before: str | None = None
        self._expanding: list[nn.Module] = []
        indexed = any(isinstance(layer, DynamicIndexedLayer) for layer in DynamicCache(config=model.config).layers)
        types = {model.config.model_type, model.config.get_text_config(decoder=True).model_type}
        if indexed or types & OWN_ATTENTION or not model._can_set_attn_implementation():
            return
        self._before = model.config._attn_implementation
        model.set_attn_implementation("alaya")
        for module in model.modules():
            if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj") and "expand_kv" not in vars(module):
                vars(module)["expand_kv"] = _hand_on(module)
                self._expanding.append(module)

    def undo(self) -> None:
        """Put back the attention the model had. Twice is fine."""
        if self._before is not None and self._before != "alaya":
            self._model.set_attn_implementation(self._before)
        for module in self._expanding:
            vars(module).pop("expand_kv", None)
        self._before, self._expanding = None, []


def _hand_on(module: Any) -> Callable[..., Any]:
    """MLA's expansion of latents to keys and values, left out for tiered ones that our attention will get."""
    expand: Any = module.expand_kv

    def expand_kv(latent: Tensor, rotary: Tensor) -> Any:
        ours = isinstance(latent, KVHandle) and module.config._attn_implementation == "alaya"
        return (latent, rotary) if ours else expand(latent, rotary)

    return expand_kv
