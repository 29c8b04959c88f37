"""Weight formats: what a compressed matrix is made of, its bytes, its dense equivalent and its forward."""

from halfplate.formats.block_diagonal import BlockDiagonal
from halfplate.formats.chain import Chain
from halfplate.formats.checks import check_stored
from halfplate.formats.linear import CompressedLinear
from halfplate.formats.low_rank import LowRank
from halfplate.formats.nm_sparse import NMSparse
from halfplate.formats.sharing import check_shared, connect
from halfplate.formats.spec import WeightSpec

__all__ = [
    "BlockDiagonal",
    "Chain",
    "CompressedLinear",
    "LowRank",
    "NMSparse",
    "WeightSpec",
    "check_shared",
    "check_stored",
    "connect",
]
