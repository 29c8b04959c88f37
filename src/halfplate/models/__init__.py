"""Reading Hugging Face decoder-only models: sources, decoder layers and their linears, running layer by layer."""

from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.linears import FoundLinear, SkippedModule, find_blocks, find_linears, replace_module
from halfplate.models.sources import LoadedModel, Source, is_compressed, load_dense, open_source, skeleton

__all__ = [
    "BlockInputs",
    "BlockwiseModel",
    "FoundLinear",
    "LoadedModel",
    "SkippedModule",
    "Source",
    "find_blocks",
    "find_linears",
    "is_compressed",
    "load_dense",
    "open_source",
    "replace_module",
    "skeleton",
]
