"""What a step costs: the formula that plans and simulations share, from a model's shape and a machine's profile."""

from dataclasses import dataclass

from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.shapes import Shape

DTYPES = {2: "bfloat16", 4: "float32"}

CODE_SHARE = 1.03
"""Bytes of codes with levels and means, over the bytes of the bits of their numbers."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds on a machine. model_bytes: of one number of the model's weights."""

    profile: Profile
    shape: Shape

    @property
    def attend(self) -> float:
        """Bytes of K and V that are attended a second."""
        return self.profile.attend_rate(DTYPES[self.shape.number_bytes], self.shape.head_dim)

    @property
    def weight_bytes(self) -> int:
        """Of the model: layers, embedding and output."""
        return (self.shape.weights + 2 * self.shape.hidden * self.shape.vocab) * self.shape.number_bytes

    @property
    def row_bytes(self) -> int:
        """K and V of one token in one kv head."""
        return 2 * self.shape.head_dim * self.shape.number_bytes

    def model(self) -> float:
        """A decode step without attention: what depends on no size, and reading the weights once."""
        read = (self.shape.weights + self.shape.hidden * self.shape.vocab) * self.shape.number_bytes
        return self.profile.step + self.shape.layers * self.profile.layer + read / self.profile.weights

    def exact(self, tokens: float) -> float:
        """Attention of a decode step to so many tokens in memory, all layers."""
        return tokens * self.shape.token_bytes / self.attend

    def sparse(self, tokens: float, window: float, found: float) -> float:
        """The same by codes: window and found are tokens, found for each kv head."""
        heads = self.shape.layers * self.shape.kv_heads
        codes = heads * max(0.0, tokens - window) * self.shape.head_dim / self.profile.scan
        picks = heads * found * (self.profile.pick + self.row_bytes / self.attend)
        return self.shape.layers * self.profile.look + self.exact(window) + codes + picks

    def disk(self, nbytes: float, block_bytes: float, depth: int = 4) -> float:
        """Reading so much from the SSD in blocks."""
        return nbytes / self.profile.transfer(block_bytes, depth).read if nbytes else 0.0

    def prefill(self, cached: int, tokens: int, chunk: int = 512) -> float:
        """Computing a prompt of which ``cached`` tokens have their KV, ``chunk`` tokens at a time."""
        chunks = -(-(tokens - cached) // chunk)
        fixed = chunks * (self.profile.step + self.shape.layers * self.profile.layer)
        return fixed + self.shape.prefill_flops(cached, tokens) / self.profile.flops
