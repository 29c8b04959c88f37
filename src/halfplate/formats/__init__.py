"""Weight formats: the parts of a compressed matrix, its stored tensors, its full matrix and its forward pass."""

from halfplate.formats.chain import Chain
from halfplate.formats.checks import check_stored
from halfplate.formats.embedding import CompressedEmbedding
from halfplate.formats.linear import CompressedLinear, CompressedMatrix
from halfplate.formats.parts import PARTS
from halfplate.formats.parts.base import Outer, Part
from halfplate.formats.parts.block_diagonal import BlockDiagonal
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.parts.low_rank import LowRank
from halfplate.formats.parts.permutation import Permutation
from halfplate.formats.parts.wrapper import InWrapper, OutWrapper
from halfplate.formats.sharing import check_shared, connect
from halfplate.formats.spec import ExtraPart, WeightSpec
from halfplate.formats.stand_in import dense_module, stand_in

__all__ = [
    "PARTS",
    "BlockDiagonal",
    "Chain",
    "CompressedEmbedding",
    "CompressedLinear",
    "CompressedMatrix",
    "ExtraPart",
    "InWrapper",
    "LowRank",
    "NMSparse",
    "OutWrapper",
    "Outer",
    "Part",
    "Permutation",
    "WeightSpec",
    "check_shared",
    "check_stored",
    "connect",
    "dense_module",
    "stand_in",
]
