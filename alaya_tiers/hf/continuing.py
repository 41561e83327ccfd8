"""What ``generate`` asks a filled cache to continue.

It never tells the cache: it asks for the cache's length and subtracts it from the prompt's. With nothing left it runs
the whole prompt a second time; with only new tokens and no mask it drops as many of them as the cache is long; neither
says a word. That question, asked by ``GenerationMixin._prefill``, is the one moment at which a cache can tell.
"""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin

_PREFILL: Any = GenerationMixin._prefill
_ASSISTED: Any = GenerationMixin._assisted_decoding
_DEPTH = 3
"""Frames between the question and us: Cache.get_seq_length, EncoderDecoderCache's, one to spare."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is about to run.

    ids: int64 [rows, tokens], None for embeddings. tokens: its length. covered: tokens the mask speaks of, None where
    there is no mask. whole: the prompt begins with what the cache holds; else it is only what is new.
    """

    model: PreTrainedModel
    ids: Tensor | None
    tokens: int
    covered: int | None
    whole: bool


def asked() -> Prompt | None:
    """The prompt whose prefill is asking for our caller's length; None when somebody else asks."""
    frame = _caller(_PREFILL.__code__)
    if frame is None:
        return None
    here = frame.f_locals
    given, model = here["model_kwargs"], here["self"]
    if here["use_inputs_embeds"]:
        return Prompt(model, None, given["inputs_embeds"].shape[1], None, True)
    ids = here["input_ids"]
    mask = given.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    covered = mask.shape[1] if mask is not None else getattr(here["generation_config"], "_mask_length", None)
    return Prompt(model, ids, ids.shape[1], covered, covered == ids.shape[1])


def assisting() -> bool:
    """Whether assisted decoding is starting with our caller."""
    return _caller(_ASSISTED.__code__) is not None


def _caller(code: Any) -> FrameType | None:
    """The frame of this function, if it is one of those that called our caller's caller."""
    frame: FrameType | None = sys._getframe(3)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code is code:
            return frame
        frame = frame.f_back
    return None
