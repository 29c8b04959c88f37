"""Backends declare what they run: a field or a tensor that is not declared is refused, and every verb says what has no kernel."""

from dataclasses import dataclass

import pytest
import torch
from stored_linears import random_linear

import halfplate
from halfplate.cli import main
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels import linear
from halfplate.kernels.capability import check_tensors
from halfplate.pattern import Pattern
from halfplate.runtime.backends import BACKENDS, Options, backends, pack, refusal, without_kernel

WIDE_PATTERN = "no kernel for pattern 4:8, nearest setting with one: --pattern 2:4"


@dataclass(frozen=True)
class Offset(WeightSpec):
    """A specification with a field that came later."""

    offset: int = 0


@dataclass(frozen=True)
class Zeros(WeightSpec):
    """A specification with a tensor that came later."""

    def layout(self):
        return super().layout() | {"weight_zeros": ((self.d_out,), torch.int8)}


@pytest.mark.parametrize("spec", [Offset(8, 16), Offset(8, 16, offset=3), Zeros(8, 16)], ids=repr)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_new_field_or_tensor_is_refused_by_every_backend(name, spec):
    backend = BACKENDS.get(name)
    word = "weight_zeros" if isinstance(spec, Zeros) else f"offset={spec.offset}"
    for device in map(torch.device, backend.devices):
        assert (
            f"no kernel supports {'the tensor ' * isinstance(spec, Zeros)}{word}"
            in backend.refusal(spec, device).reason
        )
        assert "no kernel supports" in refusal(spec, device, backends())
    assert backend.capability.refusal(WeightSpec(8, 16)) is None


def test_no_backend_packs_what_it_does_not_know():
    for spec in (Offset(8, 16), Zeros(8, 16)):
        with pytest.raises(HalfplateError, match="no kernel supports"):
            linear.pack(spec, random_linear(WeightSpec(8, 16)))
        module = CompressedLinear(spec, False)
        assert "no kernel supports" in pack(module, Options(), backends())
        for backend in backends():
            with pytest.raises(HalfplateError, match="no kernel supports"):
                backend.pack(module)


def test_a_tensor_that_is_no_part_of_the_matrix_is_an_error():
    spec = WeightSpec(8, 16)
    with pytest.raises(HalfplateError, match="weight_zeros is not a tensor of a matrix of nm 2:4 bf16"):
        linear.pack(spec, random_linear(spec) | {"weight_zeros": torch.zeros(8)})
    check_tensors(spec, [*spec.layout(), "bias"])


def test_what_has_no_kernel_is_said_with_the_nearest_setting():
    fine, small = WeightSpec(8, 128), WeightSpec(8, 128, Pattern(4, 8), "int4")
    assert without_kernel([fine]) is None
    said = without_kernel([fine, small, small])
    assert (
        said == f"2 of 3 matrices have no kernel and run through torch, slower than the original model: {WIDE_PATTERN}"
    )
    assert "low-rank part (rank=2)" in without_kernel([WeightSpec(8, 16, rank=2)])
    assert "permuted inputs" in without_kernel([WeightSpec(8, 16, permuted=True)])


@pytest.mark.slow
def test_every_verb_says_it(tiny_folder, tmp_path, capsys):
    out, options = (
        str(tmp_path / "out"),
        ["--pattern", "4:8", "--core-dtype", "int4", "--method", "magnitude", "--no-benchmark"],
    )
    said = " ".join(WIDE_PATTERN.split())

    def spoken(*command):
        assert main(list(command)) == 0
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    assert said in spoken("plan", str(tiny_folder), *options)
    assert said in spoken("compress", str(tiny_folder), "-o", out, *options, "--quiet")
    assert (
        f"kernels: 14 of 14 matrices have no kernel and run through torch, slower than the original model: {said}"
        in spoken("inspect", out)
    )
    assert f"halfplate: warning: {out}: 14 of 14" in spoken("generate", out, "One day", "--max-new-tokens", "1")
    with pytest.warns(HalfplateWarning, match="--pattern 2:4"):
        halfplate.load(out)
    assert halfplate.plan(str(tiny_folder), method="magnitude").without_kernel is None
