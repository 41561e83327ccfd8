"""Pure search: which keys of a partition matter for a query (DIPR)."""

from alaya_tiers.index.base import Found, Index
from alaya_tiers.index.coarse import Coarse
from alaya_tiers.index.codes import Codes
from alaya_tiers.index.flat import Flat
from alaya_tiers.index.graph import Graph
from alaya_tiers.index.summary import Parted

__all__ = ["Coarse", "Codes", "Flat", "Found", "Graph", "Index", "Parted"]
