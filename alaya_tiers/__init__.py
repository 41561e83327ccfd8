"""A KV cache that is a small database: transformers contexts larger than GPU and host memory.

cache = AlayaCache.for_model(model, device_budget="256MiB", host_budget="2GiB")
model.generate(**inputs, past_key_values=cache)
"""

from alaya_tiers.config import Settings
from alaya_tiers.errors import AlayaError, BudgetTooSmall, StoreError
from alaya_tiers.hf import DB, AlayaCache, AsyncDB, GatheredWarning, attach, generate
from alaya_tiers.policies import Share, Shares
from alaya_tiers.sparse import IndexFullWarning
from alaya_tiers.stats import Stats

__all__ = [
    "DB",
    "AlayaCache",
    "AlayaError",
    "AsyncDB",
    "BudgetTooSmall",
    "GatheredWarning",
    "IndexFullWarning",
    "Settings",
    "Share",
    "Shares",
    "Stats",
    "StoreError",
    "attach",
    "generate",
]
