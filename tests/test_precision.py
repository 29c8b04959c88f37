"""The precision of running text through blocks."""

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.precision import products, resolved


def test_bf16_products_differ_and_fp32_products_do_not():
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    exact = torch.nn.functional.linear(x, weight)
    with products("fp32", "cpu"):
        assert torch.equal(torch.nn.functional.linear(x, weight), exact)
    with products("bf16", "cpu"):
        rounded = torch.nn.functional.linear(x, weight)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.2)


def test_auto_is_one_of_both():
    assert resolved("auto", "cpu") in ("bf16", "fp32")


def test_unknown_precisions_are_refused():
    with pytest.raises(HalfplateError, match="precision='fp64' is not one of auto, bf16, fp32"):
        resolved("fp64", "cpu")
