"""What ``bench ttft`` stores and asks: a model, a context as if it had read it, and what comes after it.

independent   random weights over normal keys: what a query looks for lies anywhere, the worst case for blocks
quotation     real text, and the computed model that continues any quotation from it (``quotation.py``)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alaya_tiers.parts import Chunk
from alaya_tiers.tools.baselines import FILL_TOKENS, VOCABULARY, Context, Shape, build_model
from alaya_tiers.tools.corpus import WordTokenizer, passages
from alaya_tiers.tools.demo import SLOTS
from alaya_tiers.tools.quotation import build_model as quotation_model
from alaya_tiers.tools.quotation import text_key_values
from alaya_tiers.tools.quoted import text_of


@dataclass(frozen=True, slots=True)
class Question:
    """Tokens that come after a context; answer: the token that must come then, where one must."""

    tokens: tuple[int, ...]
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """ids: [1, tokens], of the context. chunks: its keys and values, in order. settings: of sparse mode here."""

    model: Any
    ids: Tensor
    chunks: Callable[[], Iterator[Chunk]]
    questions: tuple[Question, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the context."""
        return self.ids.shape[1]

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """Of a layer's keys and values: both, kv heads, tokens, head_dim."""
        config = self.model.config
        return 2, config.num_key_value_heads, self.tokens, config.head_dim

    @property
    def layer_bytes(self) -> int:
        """Of a layer's keys and values."""
        both, heads, tokens, dim = self.layer_shape
        return int(both * heads * tokens * dim * self.model.dtype.itemsize)

    @property
    def kv_bytes(self) -> int:
        """Of all of them."""
        return self.layer_bytes * int(self.model.config.num_hidden_layers)

    def prompt(self, question: Question) -> Tensor:
        """The context and a question, [1, tokens]."""
        return torch.cat([self.ids, torch.tensor([question.tokens])], 1)


def independent(shape: Shape, sharpness: float, tokens: int, count: int) -> Subject:
    """Single tokens are asked, each another query; no answer is the right one."""
    model, context = build_model(shape, tokens + 2, sharpness), Context(shape)

    def chunks() -> Iterator[Chunk]:
        for start in range(0, tokens, FILL_TOKENS):
            n, chunk = min(FILL_TOKENS, tokens - start), []
            for layer in range(shape.layers):
                kv = torch.empty(2, 1, shape.kv_heads, n, shape.head_dim, dtype=context.dtype)
                context.write(kv, layer, start)
                chunk.append((kv[0], kv[1]))
            yield chunk

    questions = tuple(Question(((tokens + number) % VOCABULARY,)) for number in range(count))
    return Subject(model, torch.arange(tokens)[None] % VOCABULARY, chunks, questions)


def quotation(tokens: int, count: int, text: Path | None) -> Subject:
    """The fewest words that say where in the text they are; the answer is the word after them.

    Raises CorpusError for a text that is too short.
    """
    whole, _ = text_of(text, tokens)
    tokenizer = WordTokenizer.fit(whole)
    ids = tokenizer.encode(whole)
    model = quotation_model(tokenizer.vocabulary_size, slots=SLOTS)
    asked = passages(ids, count, SLOTS, 1, suffix=SLOTS).items
    questions = tuple(Question(one.prompt, one.answer[0]) for one in asked)
    return Subject(model, torch.tensor([ids]), lambda: text_key_values(model, ids), questions, {"sparse_prefill": True})
