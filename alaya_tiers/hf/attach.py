"""Ways to use the cache without passing one: attach it to a model, or name it as the generation method."""

from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GENERATION_MODES_MAPPING

from alaya_tiers.hf.cache import AlayaCache
from alaya_tiers.hf.switch import Switched

_HOOK = "_prepare_cache_for_generation"


class attach:
    """Every ``model.generate`` not given a cache gets an AlayaCache, until ``detach()`` or the end of a ``with``.

    settings: as AlayaCache takes them. Nothing but this one model object is changed.
    """

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self._switched = Switched(model)
        self._original: Any = getattr(model, _HOOK)
        vars(model)[_HOOK] = self._prepare

    def detach(self) -> None:
        """Make the model what it was. Twice is fine."""
        if vars(self.model).get(_HOOK) == self._prepare:
            vars(self.model).pop(_HOOK)
        self._switched.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _supports(self) -> bool:
        model: Any = self.model
        return bool(model._supports_default_dynamic_cache())

    def _prepare(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mine = generation_config.use_cache is not False and generation_config.cache_implementation in (None, "dynamic")
        if mine and model_kwargs.get("past_key_values") is None and self._supports():
            model_kwargs["past_key_values"] = _new_cache(self.model, self.settings)
        return self._original(generation_config, model_kwargs, *args, **kwargs)


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """For ``model.generate(..., custom_generate=alaya_tiers.generate)``: one call with default settings.

    The mode (greedy, sampling, beams, assisted) is what the other arguments of ``generate`` ask for. A cache that was
    given is used as it is. The model's attention is put back afterwards.
    """
    given = model_kwargs.get("past_key_values")
    if not isinstance(given, Cache) or (given.get_seq_length() == 0 and not _ours(given)):
        model_kwargs["past_key_values"] = _new_cache(model, {})
    mode = generation_config.get_generation_mode(model_kwargs.get("assistant_model"))
    method = getattr(type(model), GENERATION_MODES_MAPPING[mode])
    switched = Switched(model)
    try:
        return method(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
    finally:
        switched.undo()


def _new_cache(model: PreTrainedModel, settings: dict[str, Any]) -> Cache:
    text = model.config.get_text_config(decoder=True)
    cache = AlayaCache(config=text, **settings)
    return EncoderDecoderCache(cache, DynamicCache(config=text)) if model.config.is_encoder_decoder else cache


def _ours(cache: Cache) -> bool:
    return isinstance(cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache, AlayaCache)
