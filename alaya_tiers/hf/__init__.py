"""The only part that knows transformers: the cache class, the attention function and the mask function.

Importing it adds the name "alaya" to transformers' registries and changes nothing that was there.
"""

from importlib.metadata import version

from packaging.version import Version

LOWEST, BELOW = Version("5.23.0"), Version("6")

_found = Version(version("transformers"))
if not LOWEST <= _found < BELOW:
    raise ImportError(
        f"alaya_tiers works with transformers >= {LOWEST}, < {BELOW}; {_found} is installed. "
        f"Run: pip install 'transformers>={LOWEST},<{BELOW}'"
    )

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from alaya_tiers.hf.attach import attach, generate  # noqa: E402
from alaya_tiers.hf.attention import alaya_attention_forward  # noqa: E402
from alaya_tiers.hf.cache import AlayaCache  # noqa: E402
from alaya_tiers.hf.db import DB  # noqa: E402
from alaya_tiers.hf.handles import GatheredWarning, KVHandle  # noqa: E402
from alaya_tiers.hf.layer import AlayaLayer  # noqa: E402
from alaya_tiers.hf.masks import alaya_mask  # noqa: E402
from alaya_tiers.hf.serving import AsyncDB  # noqa: E402

AttentionInterface.register("alaya", alaya_attention_forward)
AttentionMaskInterface.register("alaya", alaya_mask)

__all__ = [
    "DB",
    "AlayaCache",
    "AlayaLayer",
    "AsyncDB",
    "GatheredWarning",
    "KVHandle",
    "alaya_attention_forward",
    "alaya_mask",
    "attach",
    "generate",
]
