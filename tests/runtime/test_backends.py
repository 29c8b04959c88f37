"""Every verb works on a model that any backend packed, and a backend is one file and one line of the registry."""

from pathlib import Path

import pytest
import torch

import halfplate
from halfplate.checkpoint.weights import read_headers
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels import native
from halfplate.pattern import Pattern
from halfplate.runtime import accelerate, explain, restore
from halfplate.runtime.backends import BACKENDS, Backend, Options, Packed, backends, pack, refusal
from halfplate.runtime.backends.cpu import NativeKernels
from halfplate.runtime.backends.cuda import SemiStructuredProducts
from halfplate.storage.tensor_file import read_tensors

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "extensions"
IDS = torch.arange(3, 20)[None]
CPU = torch.device("cpu")


class Pretended(SemiStructuredProducts):
    """The processor passes for a GPU; the packed core is the dense matrix itself."""

    devices = frozenset({"cpu"})

    def unavailable(self, device):
        return None


class Overriding(NativeKernels):
    """A backend that answers for itself whether it knows a field."""

    def refusal(self, spec, device):
        return None


PRETENDED, OVERRIDING = Pretended(), Overriding()
TOLERANCE = {"cpu": 1e-4, "pretended": 0.02, "expanded": 1e-4}  # of the largest logit; a GPU multiplies in halves


@pytest.fixture
def registered(monkeypatch):
    """The example as one more line of the registry, and the GPU's backend on the processor."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(BACKENDS.own, "expanded", "halfplate_extensions.backend:EXPANDING")
    monkeypatch.setitem(BACKENDS.own, "pretended", f"{__name__}:PRETENDED")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense)


@pytest.fixture(scope="module")
def checkpoint(tiny_folder_once, tmp_path_factory):
    """The tiny model in 2:4 between wrappers, which matrices of one input share."""
    out = tmp_path_factory.mktemp("backends") / "compressed"
    recipe = {"method": "armor", "method_options": {"iterations": 1}, "block_size": 8, "share_wrappers": True}
    halfplate.compress(str(tiny_folder_once), out, **recipe, samples=2, seq_len=16)
    return out


@pytest.fixture(params=["cpu", "pretended", "expanded"])
def name(request, registered):
    if request.param == "cpu" and not native.available():
        pytest.skip("the native kernels were not built")
    return request.param


@pytest.fixture
def packed(checkpoint, name):
    """The model with all compressed linears packed by the one backend."""
    model = halfplate.load(checkpoint, kernels=False)
    accelerate(model, backends=[name])
    return model


def names_of(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@torch.no_grad()
def test_it_computes_saves_and_comes_back(packed, name, checkpoint, tmp_path):
    plain = halfplate.load(checkpoint, kernels=False)
    expected, compressed = plain(IDS).logits, names_of(plain, CompressedLinear)
    assert any(plain.get_submodule(one).spec.in_shared for one in compressed)
    assert compressed <= names_of(packed, Packed)
    assert not names_of(packed, CompressedLinear)
    paths = {linear.name: linear.path for linear in explain(packed).linears}
    assert all(paths[one] != "torch" for one in compressed)
    assert float((packed(IDS).logits - expected).abs().max() / expected.abs().max()) < TOLERANCE[name]
    packed.save_pretrained(tmp_path / "again")
    first, again = (dict(read_tensors(read_headers(folder))) for folder in (checkpoint, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    restore(packed)
    assert torch.equal(packed(IDS).logits, expected)
    assert names_of(packed, CompressedLinear) == compressed


@torch.no_grad()
def test_it_dequantizes(packed, checkpoint):
    expected = halfplate.load(checkpoint, kernels=False)(IDS).logits
    dense = packed.dequantize(torch.float32)
    assert not names_of(dense, CompressedLinear | Packed)
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_it_takes_adapters(packed, checkpoint):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[peft]')")
    from halfplate.adapters import adapted

    before = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    model = peft.get_peft_model(packed, adapted(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.unload().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@torch.no_grad()
def test_one_file_and_one_line_run_what_nothing_ran(registered, tiny_folder_once, tmp_path):
    options = {"method": "magnitude", "pattern": "4:8"}
    assert halfplate.plan(str(tiny_folder_once), **options).without_kernel is None
    halfplate.compress(str(tiny_folder_once), tmp_path / "out", **options)
    model = halfplate.load(tmp_path / "out")
    paths = [linear.path for linear in explain(model).linears]
    assert paths.count("expanded 4:8 in torch.float32") == 14


def test_all_reasons_are_given(registered):
    spec = WeightSpec(8, 16, Pattern(4, 8))
    both = [BACKENDS.get("cpu"), BACKENDS.get("pretended")]
    if native.available():
        assert refusal(spec, CPU, both[:1]) == "no kernel for pattern 4:8"
    said = refusal(spec, CPU, both)
    assert "native kernels: no kernel for pattern 4:8; semi-structured products of torch: " in said
    assert refusal(spec, CPU, [*both, BACKENDS.get("expanded")]) is None
    assert refusal(spec, torch.device("meta"), both) == "on device meta"


def test_a_tensor_that_no_specification_names_is_an_error(name):
    module = CompressedLinear(WeightSpec(8, 16), False)
    module.register_buffer("weight_zeros", torch.zeros(8))
    for among in ([BACKENDS.get(name)], backends()):
        with pytest.raises(HalfplateError, match="weight_zeros is not a tensor of a matrix of nm 2:4 bf16"):
            pack(module, Options(), among)


def test_a_linear_with_a_forward_of_its_own_stays(checkpoint, name):
    class Doubled(CompressedLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = halfplate.load(checkpoint, kernels=False)
    place = next(iter(names_of(model, CompressedLinear)))
    model.get_submodule(place).__class__ = Doubled
    said = {linear.name: linear for linear in accelerate(model, backends=[name]).linears}
    assert said[place].reason == "Doubled has a forward of its own"


def test_unknown_and_broken_backends(monkeypatch):
    with pytest.raises(HalfplateError, match="backend='cuba' is unknown; did you mean 'cuda'"):
        backends(["cuba"])
    assert "overrides refusal" in BACKENDS._fault(OVERRIDING, "own")
    assert "expected an instance" in BACKENDS._fault(Backend, "own")

    def get(name):
        raise HalfplateError("backend='own' of some package cannot be imported; update or uninstall that package")

    before = backends()
    monkeypatch.setattr(type(BACKENDS), "names", lambda self: [*self.own, "own"])
    found, whole = BACKENDS.get, BACKENDS.own
    monkeypatch.setattr(BACKENDS, "get", lambda name: found(name) if name in whole else get(name))
    with pytest.warns(HalfplateWarning, match="update or uninstall"):
        assert backends() == before
