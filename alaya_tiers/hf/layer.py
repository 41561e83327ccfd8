"""One full-attention layer of the cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from alaya_tiers.cache import Session, Visible
from alaya_tiers.errors import AlayaError, InputError
from alaya_tiers.hf.handles import KVHandle


class AlayaLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One full-attention layer in the tiers. ``update`` returns handles, not tensors."""

    is_compileable, is_sliding, is_croppable, supports_early_init = False, False, True, True

    def __init__(self, session: Session, number: int, undo: Callable[[int], None]) -> None:
        self.session, self.number = session, number
        self._undo = undo
        self.version = 0
        self.before = 0
        """Length before the last update: where to go back to when a step fails."""
        self.is_initialized = False
        self.dtype, self.device = torch.float32, torch.device("cpu")

    # ------------------------------------------------------------------ what a forward calls
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.before = self.get_seq_length()
        self.session.update(self.number, key_states, value_states)
        self.lazy_initialization(key_states, value_states)
        self.version += 1
        length = self.get_seq_length()
        k_shape = (*key_states.shape[:2], length, key_states.shape[3])
        v_shape = (*value_states.shape[:2], length, value_states.shape[3])
        return (
            KVHandle(self, "k", k_shape, self.dtype, self.device),
            KVHandle(self, "v", v_shape, self.dtype, self.device),
        )

    def attend(
        self,
        query: Tensor,
        visible: Callable[[int], Visible],
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        *,
        latent: bool = False,
    ) -> Tensor:
        """Exact attention; see TieredLayer."""

        def run() -> Tensor:
            try:
                rows = [visible(r) for r in range(query.shape[0])]
                return self.session.attention(self.number, query, rows, scale, softcap, sinks, latent=latent)
            except AlayaError:
                self._undo(self.before)
                raise

        if query.requires_grad and torch.is_grad_enabled():
            found: Tensor = _NoGradient.apply(query, run)  # type: ignore[no-untyped-call]
            return found
        with torch.no_grad():
            return run()

    def gather(self, role: str) -> Tensor:
        """All of K ("k") or V ("v") as one tensor."""
        k, v = self.session.gather(self.number)
        return (k if role == "k" else v).to(self.device)

    def dense(self) -> DynamicLayer:
        """The same layer as transformers keeps it."""
        made = DynamicLayer()  # type: ignore[no-untyped-call]
        if self.is_initialized and self.get_seq_length():
            k, v = self.session.gather(self.number)
            made.update(k.to(self.device), v.to(self.device))
        return made

    # ------------------------------------------------------------------ sizes
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.session.length(self.number)

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return self.session.rows(self.number) if self.is_initialized else 0

    # ------------------------------------------------------------------ what generate does between forwards
    def reset(self) -> None:
        self._change()
        if self.number in self.session.layers:
            self.session.layers.pop(self.number).clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise InputError("crop takes the negative number of tokens to remove, e.g. crop(-3)")
        if tokens_to_remove and self.is_initialized:
            self._change()
            self.session.crop(max(0, self.get_seq_length() + tokens_to_remove), self.number)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[torch.as_tensor(indices, device="cpu")].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select([r for r in range(self.batch_size) for _ in range(repeats)])

    def offload(self) -> None:
        """Blocks move by themselves."""

    def prefetch(self) -> None:
        """Blocks move by themselves."""

    # ------------------------------------------------------------------ code that reads or assigns whole tensors
    @property
    def keys(self) -> Tensor | None:
        """All keys, gathered; None before the first update."""
        return self.gather("k") if self.is_initialized else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            self._assign(value, self.values if self.is_initialized else value)

    @property
    def values(self) -> Tensor | None:
        """All values, gathered; None before the first update."""
        return self.gather("v") if self.is_initialized else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            self._assign(self.keys if self.is_initialized else value, value)

    # ------------------------------------------------------------------ inside
    def fork(self, session: Session, undo: Callable[[int], None]) -> "AlayaLayer":
        """This layer in a forked session."""
        other = AlayaLayer(session, self.number, undo)
        other.dtype, other.device, other.is_initialized = self.dtype, self.device, self.is_initialized
        return other

    def _select(self, rows: Sequence[int]) -> None:
        if self.is_initialized:
            self._change()
            self.session.select(self.number, rows)

    def _assign(self, k: Tensor | None, v: Tensor | None) -> None:
        assert k is not None
        assert v is not None
        n = min(k.shape[2], v.shape[2])
        self.reset()
        self.update(k[:, :, :n], v[:, :, :n])

    def _change(self) -> None:
        self.version += 1


class _NoGradient(torch.autograd.Function):
    """Attention whose gradient is an error, not silently zero."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, run: Callable[[], Tensor]) -> Tensor:
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise InputError("no gradient flows through an AlayaCache: train without past_key_values (use_cache=False)")
