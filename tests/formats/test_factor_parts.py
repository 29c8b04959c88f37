"""The parts of matrices without a core: their full matrix against loops over elements, products, rows, columns, checks and training."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedLinear, WeightSpec, check_stored
from halfplate.formats.encoding.packing import unpack
from halfplate.formats.needs import needs_of
from halfplate.formats.sharding import shard
from halfplate.methods import create
from halfplate.pattern import NONE, Pattern
from halfplate.recovery.trainable import TrainableLinear
from halfplate.statistics import InputStatistics

D_OUT, D_IN = 24, 64
METHODS = {
    "svd": {},
    "bitstack": {},
    "rocket": {},
    "cospadi": {"iterations": 1},
    "monarch": {},
    "gqsa": {"kept": 0.5, "width": 16},
}
every = pytest.mark.parametrize("name", METHODS)


def solved(name: str, d_out: int = D_OUT, d_in: int = D_IN) -> Chain:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(d_out, d_in, generator=generator), torch.randn(200, d_in, generator=generator)
    gram = inputs.T @ inputs / len(inputs)
    method = create(name, **METHODS[name])
    spec = method.sized(WeightSpec(d_out, d_in, NONE))
    return method.compress(weight, InputStatistics(200, gram.diagonal(), gram), spec).weight


def by_loops(chain: Chain) -> Tensor:
    """The full matrix as docs/format.md describes it, element by element."""
    spec, tensors = chain.spec, {name: tensor.float() for name, tensor in chain.tensors().items()}
    found = torch.zeros(spec.d_out, spec.d_in)
    options = {extra.name: dict(extra.options) for extra in spec.parts}
    if spec.rank:
        found += tensors["weight_left"] @ tensors["weight_right"]
    for level in range(options.get("bit_stack", {}).get("levels", 0)):
        magnitudes = tensors[f"weight_magnitude_left_{level}"] @ tensors[f"weight_magnitude_right_{level}"]
        for row in range(spec.d_out):
            for column in range(spec.d_in):
                byte = int(tensors[f"weight_signs_{level}"][row, column // 8])
                found[row, column] += magnitudes[row, column] * (-1 if byte >> column % 8 & 1 else 1)
    if "dictionary" in options:
        for row in range(spec.d_out):
            bits = unpack(chain.tensors()["weight_chosen"], options["dictionary"]["atoms"], 1)[row]
            for place, atom in enumerate(bits.nonzero()[:, 0]):
                found[row] += tensors["weight_coefficients"][row, place] * tensors["weight_atoms"][atom]
    if "monarch" in options:
        blocks, rank = options["monarch"]["blocks"], options["monarch"]["rank"]
        left, right = tensors["weight_monarch_left"], tensors["weight_monarch_right"]
        width = spec.d_in // blocks
        for row in range(spec.d_out):
            for column in range(spec.d_in):
                j, k = row % blocks, column // width
                for b in range(rank):
                    found[row, column] += left[j, row // blocks, k * rank + b] * right[k, j * rank + b, column % width]
    if "group_sparse" in options:
        width = options["group_sparse"]["width"]
        for row in range(spec.d_out):
            groups = unpack(chain.tensors()["weight_groups"], -(-spec.d_in // width), 1)[row].nonzero()[:, 0]
            for place, group in enumerate(groups):
                for inside in range(min(width, spec.d_in - int(group) * width)):
                    byte = int(tensors["weight_group_codes"][row, (place * width + inside) // 2])
                    code = byte >> 4 * (inside % 2) & 15
                    found[row, group * width + inside] = (code - 8) * tensors["weight_group_scales"][row, place]
    return found


@every
def test_full_matrix_product_and_bytes(name: str) -> None:
    chain = solved(name)
    reference = by_loops(chain)
    assert torch.allclose(chain.dense(), reference, atol=1e-5)
    x = torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(chain.forward(x), x @ reference.T, atol=1e-4)
    assert chain.spec.nbytes == sum(tensor.nbytes for tensor in chain.tensors().values()) == chain.nbytes
    assert chain.shape == (D_OUT, D_IN)
    assert tuple(chain.tensors()["weight"].shape) == (0,)  # other software refuses it


@every
def test_specification_survives_json(name: str) -> None:
    spec = solved(name).spec
    assert WeightSpec.from_json(spec.to_json(), "m") == spec
    assert "layout no-core" in needs_of([spec])
    assert set(spec.kinds()) == set(spec.layout())


@every
def test_rows_and_columns(name: str) -> None:
    chain = solved(name)
    whole, spec = chain.dense(), chain.spec
    cut = shard(spec, chain.tensors(), "rows", 8, 12)
    assert torch.allclose(cut.dense(), whole[8:20], atol=1e-6)
    if all(part.columns_together(spec) for part in spec.classes):
        cut = shard(spec, chain.tensors(), "columns", 32, 32)
        assert torch.allclose(cut.dense(), whole[:, 32:], atol=1e-6)


@every
def test_training_moves_and_stores(name: str) -> None:
    chain = solved(name)
    linear = CompressedLinear.from_weight(chain, chain.spec, None)
    trained = TrainableLinear(linear, values_too=True)
    assert torch.allclose(trained.dense(), chain.dense(), atol=1e-5)
    trained(torch.ones(2, D_IN)).square().sum().backward()
    parameters = [part for part in trained.parameters() if part.requires_grad and part.numel()]
    assert parameters
    assert all(part.grad is not None for part in parameters)
    with torch.no_grad():
        parameters[0].mul_(1.5)
    stored = trained.compressed()
    check_stored(stored.spec, stored.stored(), name)
    assert not torch.allclose(stored.matrix.dense(), chain.dense())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("rocket", "weight_chosen", "chooses .* atoms in a row, expected"),
        ("gqsa", "weight_groups", "chooses .* groups in a row, expected"),
    ],
)
def test_damaged_positions_are_refused(name: str, tensor: str, message: str) -> None:
    chain = solved(name)
    tensors = {key: value.clone() for key, value in chain.tensors().items()}
    tensors[tensor][1, 0] ^= 1
    with pytest.raises(HalfplateError, match=message):
        check_stored(chain.spec, tensors, name)


def test_padding_of_signs_is_checked() -> None:
    chain = solved("bitstack", 16, 36)
    tensors = {key: value.clone() for key, value in chain.tensors().items()}
    check_stored(chain.spec, tensors, "m")
    tensors["weight_signs_0"][0, -1] = 128
    with pytest.raises(HalfplateError, match="padding bits that are not 0"):
        check_stored(chain.spec, tensors, "m")


def test_last_group_may_be_padded() -> None:
    chain = solved("gqsa", 8, 40)
    assert torch.allclose(chain.dense(), by_loops(chain), atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        {"bit_stack": {"levels": 0, "rank": 1}},
        {"bit_stack": {"levels": 1}},
        {"bit_stack": {"levels": 10**9, "rank": 1}},
        {"dictionary": {"atoms": 2, "kept": 3}},
        {"dictionary": {"atoms": True, "kept": 1}},
        {"monarch": {"blocks": 5, "rank": 1}},
        {"monarch": {"blocks": 4, "rank": 7}},
        {"group_sparse": {"width": 3, "kept": 1}},
        {"group_sparse": {"width": 16, "kept": 5}},
    ],
)
def test_options_of_strangers_are_refused(parts: dict[str, dict[str, int]]) -> None:
    entry = replace(solved("svd").spec, rank=1).to_json() | {"format": "parts", "parts": parts, "rank": 0}
    with pytest.raises(HalfplateError, match="cannot be read"):
        WeightSpec.from_json(entry, "m")


def test_pattern_none() -> None:
    assert Pattern.parse("none") == NONE
    assert str(NONE) == "none"
    assert NONE.kept(7) == 0
    with pytest.raises(HalfplateError, match="keeps no value; write none"):
        Pattern.parse("0:1")
