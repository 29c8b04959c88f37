"""A checkpoint of codes whose sizes the formats of other tools divide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfplate.recipe import Recipe

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """`checkpoint(**fields)` compresses a tiny Llama by a recipe of these fields, to read; unpruned nl4 rounded in groups of 32 without them."""
    from conftest import build_model

    folder, made = tmp_path_factory.mktemp("exports") / "model", dict[str, Path]()
    build_model("llama", vocab_size=len(tiny_tokenizer), **SIZES).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    plain = {"method": "rtn", "pattern": "dense", "block_size": 0, "core_dtype": "nl4", "group_size": 32}

    def make(**fields: Any) -> Path:
        from halfplate.compression.compress import compress

        if repr(fields) not in made:
            out = tmp_path_factory.mktemp("exported") / "out"
            compress(str(folder), out, Recipe(**plain | {"threads": 1, "samples": 2, "seq_len": 16} | fields))
            made[repr(fields)] = out
        return made[repr(fields)]

    return make
