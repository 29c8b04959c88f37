"""The comparison of texts: the first token that differs, and the gap there."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import pytest
import same_bytes
from same_text import row


def test_a_row_names_the_first_token_that_differs() -> None:
    asked = []

    def gap(number: int, place: int, other: int) -> float:
        asked.append((number, place, other))
        return 0.0125

    reference = [[1, 2, 3], [4, 5, 6]]
    assert row("one", reference, reference, gap) == ["one", "2 of 2", "–"]
    assert not asked
    assert row("two", [[1, 2, 3], [4, 9, 9]], reference, gap) == ["two", "1 of 2", "prompt 2: token 2, 0.013"]
    assert asked == [(1, 1, 9)]


def test_every_matrix_gets_the_type_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = {"token_embd.weight": "Q6_K"}
    for layer in range(4):
        types |= {f"blk.{layer}.{part}.weight": "Q3_K" for part in ("attn_q", "attn_k", "ffn_gate", "ffn_up")}
        types |= {f"blk.{layer}.attn_output.weight": "Q4_K", f"blk.{layer}.ffn_down.weight": "Q4_K"}
        types[f"blk.{layer}.attn_v.weight"] = "Q5_K" if layer < 2 else "Q4_K"
    (tmp_path / "llama Q3_K_M.json").write_text(json.dumps({"types": types}))
    monkeypatch.setattr(same_bytes, "FOLDER", tmp_path)
    fields = same_bytes.exact_types("Q3_K_M")
    assert {name: fields[name] for name in ("core_dtype", "group_size", "embedding_dtype")} == {
        "core_dtype": "int3k",
        "group_size": 16,
        "embedding_dtype": "int6k",
    }
    from halfplate.recipe import Recipe

    recipe = Recipe(pattern="dense", core_dtype="int3k", group_size=16, types=tuple(fields["types"]))
    found = [
        recipe.core_of(f"model.layers.{name}") for name in ("0.self_attn.v_proj", "3.self_attn.v_proj", "2.mlp.up_proj")
    ]
    assert found == [("affine5k", 32), ("affine4k", 32), ("int3k", 16)]
    assert recipe.core_of("model.layers.1.self_attn.o_proj") == ("affine4k", 32)
