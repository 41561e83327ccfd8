"""Switching a model to our attention, and back."""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer

from alaya_tiers.hf.handles import KVHandle

OWN_ATTENTION = {
    "deepseek_v4",  # attends to compressed tokens, through a mask it makes itself
    "git",  # its text part adds the mask to scores itself; only its vision part can be switched
    "minimax_m3_vl_text",  # picks blocks of keys itself
}
"""Model types transformers would let us switch, to a wrong result. Found by the census (docs/compatibility.md)."""

_STOCK = DynamicCache.__module__


class Switched:
    """A model whose attention is "alaya" as far as its code allows that; ``undo`` puts back what was there.

    Models with sparse attention of their own keep their attention: ours would be wrong for them. Models that keep
    compressed KV and expand it themselves (MLA) are told to hand it on as it is; attention then runs over the latents.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._before: str | None = None
        self._expanding: list[nn.Module] = []
        if not _can_switch(model):
            return
        self._before = model.config._attn_implementation
        model.set_attn_implementation("alaya")
        self._expanding = hand_on_latents(model)

    def undo(self) -> None:
        """Put back the attention the model had. Twice is fine."""
        if self._before is not None and self._before != "alaya":
            self._model.set_attn_implementation(self._before)
        for module in self._expanding:
            vars(module).pop("expand_kv", None)
        self._before, self._expanding = None, []


def _can_switch(model: PreTrainedModel) -> bool:
    """Whether "alaya" would be right for the model, and of use: some layer is tiered, none attends in its own way.

    A cache layer that is indexed, or comes from the model's own file, means sparse attention of its own.
    """
    layers = DynamicCache(config=model.config).layers
    own = any(isinstance(layer, DynamicIndexedLayer) or type(layer).__module__ != _STOCK for layer in layers)
    types = {model.config.model_type, model.config.get_text_config(decoder=True).model_type}
    tiered = not layers or any(type(layer) is DynamicLayer for layer in layers)
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    refused = own or types & OWN_ATTENTION
    return tiered and not refused and any(part._can_set_attn_implementation() for part in parts)


def hand_on_latents(model: nn.Module) -> list[nn.Module]:
    """Let MLA modules give tiered latents to attention as they are; the modules this changed."""
    changed = []
    for module in model.modules():
        if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj") and "expand_kv" not in vars(module):
            vars(module)["expand_kv"] = MethodType(_expand_unless_tiered, module)
            changed.append(module)
    return changed


def _expand_unless_tiered(module: Any, latent: Tensor, rotary: Tensor) -> Any:
    """MLA's expansion of latents to keys and values, left out for tiered ones that our attention will get.

    A method of the instance, so that a copy of the model has one of its own.
    """
    ours = isinstance(latent, KVHandle) and module.config._attn_implementation == "alaya"
    return (latent, rotary) if ours else type(module).expand_kv(module, latent, rotary)
