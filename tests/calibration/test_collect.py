"""Input statistics of a block's linears."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from halfplate.calibration import collect_block, input_stages, recorded_inputs, stage_sums
from halfplate.calibration.collect import Sums
from halfplate.errors import HalfplateError
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.linears import find_linears
from halfplate.statistics import InputStatistics, Statistic

IDS = torch.randint(3, 128, (6, 11), generator=torch.Generator().manual_seed(0))


def names_of(model: Any, block: int) -> list[str]:
    return [linear.name for linear in find_linears(model)[0] if linear.block == block]


def run(model: Any, block: int, statistic: Statistic, batches: list[int]) -> dict[str, InputStatistics]:
    """Statistics of a block, with the samples in batches of the given sizes."""
    blockwise = BlockwiseModel(model)
    inputs = [blockwise.embed(part) for part in IDS.split(batches)]
    for index in range(block):
        inputs = [blockwise.run_block(index, batch) for batch in inputs]
    return collect_block(blockwise, block, inputs, names_of(model, block), statistic)[0]


def inputs_naively(model: Any, names: list[str]) -> dict[str, Tensor]:
    """All inputs of each linear in one forward of the whole model, fp64 (tokens, d_in)."""
    seen: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1).double()}))
    model(IDS)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi", "phi3"])
def test_statistics_equal_those_of_the_whole_model(tiny_model: Any, architecture: str) -> None:
    found = run(tiny_model(architecture), 1, Statistic.GRAM, [4, 2])
    model = tiny_model(architecture)
    for name, x in inputs_naively(model, names_of(model, 1)).items():
        statistics = found[name]
        assert statistics.tokens == len(x) == IDS.numel()
        assert statistics.require_diagonal().dtype == torch.float32
        torch.testing.assert_close(statistics.require_diagonal().double(), x.square().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.require_gram(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistic", list(Statistic))
def test_no_more_is_collected_than_asked(tiny_model: Any, statistic: Statistic) -> None:
    for statistics in run(tiny_model(), 0, statistic, [6]).values():
        assert statistics.tokens == IDS.numel()
        assert (statistics.diagonal is not None) == (statistic >= Statistic.DIAGONAL)
        assert (statistics.gram is not None) == (statistic >= Statistic.GRAM)


def test_linears_with_one_input_share_one_object(tiny_model: Any) -> None:
    found = {name.rpartition(".")[2]: one for name, one in run(tiny_model(), 0, Statistic.GRAM, [2, 4]).items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(one) for one in found.values()}) == 4


@pytest.mark.parametrize("batches", [[1] * 6, [5, 1], [3, 3]])
def test_batches_do_not_matter(tiny_model: Any, batches: list[int]) -> None:
    whole, parts = (run(tiny_model(), 1, Statistic.GRAM, sizes) for sizes in ([6], batches))
    for name, one in whole.items():
        torch.testing.assert_close(one.require_diagonal(), parts[name].require_diagonal(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.require_gram(), parts[name].require_gram(), rtol=1e-4, atol=1e-4)


def test_outputs_are_those_of_the_block_and_no_hook_stays(tiny_model: Any) -> None:
    model = tiny_model("gemma3_text")
    blockwise = BlockwiseModel(model)
    inputs = [blockwise.embed(part) for part in IDS.split(3)]
    for index in range(len(blockwise.blocks)):
        _, inputs = collect_block(blockwise, index, inputs, names_of(model, index), Statistic.DIAGONAL)
    logits = torch.cat([blockwise.finish(batch) for batch in inputs])
    torch.testing.assert_close(logits, model(IDS).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 9),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    scale=st.sampled_from([1e-3, 1.0, 3e4]),
    seed=st.integers(0, 99),
)
def test_sums_equal_a_whole_matrix_in_fp64(d_in: int, chunks: list[int], scale: float, seed: int) -> None:
    x = torch.randn(sum(chunks), d_in, generator=torch.Generator().manual_seed(seed))
    # One huge input, as of the first token of a sequence.
    x[0, 0] *= scale
    sums = Sums()
    for chunk in x.split(chunks):
        sums.add(chunk, Statistic.GRAM, None)
    statistics = sums.statistics()
    exact = x.double()
    gram = exact.T @ exact / len(x)
    torch.testing.assert_close(statistics.require_diagonal().double(), gram.diagonal(), rtol=1e-6, atol=0)
    # Rounding is relative to the sizes of the two columns, as in any fp32 product.
    norms = gram.diagonal().sqrt()
    assert ((statistics.require_gram() - gram).abs() <= 1e-5 * norms[:, None] * norms[None, :]).all()


class ToyBlock(nn.Module):
    """A block with an input that two linears share unless it is changed in place, and a linear that may not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.rare = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.mode = "shared"

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.clone()
        out = self.first(input=x) if self.mode == "keyword" else self.first(x)
        if self.mode == "in place" or (self.mode == "sometimes" and len(hidden) == 1):
            x.mul_(2)
        out = out + self.second(x)
        return out + self.second(torch.zeros(len(hidden), 1, 4)) if self.mode == "delayed" else out


class ToyModel:
    """What collect_block needs of a BlockwiseModel."""

    def __init__(self, mode: str) -> None:
        block = ToyBlock()
        block.mode = mode
        self.prefix, self.blocks = "layers", nn.ModuleList([block]).requires_grad_(False)

    def run_block(self, index: int, inputs: BlockInputs) -> BlockInputs:
        return BlockInputs(self.blocks[index](inputs.hidden), inputs.arguments)


def collect_toy(mode: str, names: list[str], hidden: Tensor | None = None) -> dict[str, InputStatistics]:
    hidden = torch.ones(3, 2, 4) if hidden is None else hidden
    batches = [BlockInputs(part, []) for part in hidden.split([2, 1])]
    return collect_block(ToyModel(mode), 0, batches, names, Statistic.GRAM)[0]  # type: ignore[arg-type]


def test_an_input_changed_in_place_is_another_input() -> None:
    names = ["layers.0.first", "layers.0.second"]
    found = collect_toy("shared", names)
    assert found[names[0]] is found[names[1]]
    found = collect_toy("in place", names)
    assert torch.equal(found[names[0]].require_diagonal(), torch.ones(4))
    assert torch.equal(found[names[1]].require_diagonal(), 4 * torch.ones(4))


def test_an_input_passed_by_keyword_counts() -> None:
    found = collect_toy("keyword", ["layers.0.first"])
    assert torch.equal(found["layers.0.first"].require_gram(), torch.ones(4, 4, dtype=torch.float64))


def test_a_second_call_with_zeros_says_nothing() -> None:
    """Zaya's value projection also runs on a token before the first."""
    names = ["layers.0.first", "layers.0.second"]
    found, expected = collect_toy("delayed", names), collect_toy("shared", names)
    assert found[names[0]] is found[names[1]]
    assert torch.equal(found[names[0]].require_gram(), expected[names[0]].require_gram())
    assert found[names[0]].tokens == expected[names[0]].tokens


def test_a_linear_that_never_ran_is_named() -> None:
    with pytest.raises(HalfplateError, match=r"^layers\.0\.rare never ran"):
        collect_toy("shared", ["layers.0.first", "layers.0.rare"])


def test_an_input_shared_only_sometimes_is_refused() -> None:
    with pytest.raises(HalfplateError, match=r"^layers\.0\.second shares its input with layers\.0\.first in some"):
        collect_toy("sometimes", ["layers.0.first", "layers.0.second"])


def test_a_name_of_another_block_is_refused() -> None:
    for name in ("layers.1.first", "layers.0.third"):
        with pytest.raises(HalfplateError, match="is not a module of layer 0"):
            collect_toy("shared", [name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    hidden = torch.ones(3, 2, 4)
    hidden[2, 1, 3] = value
    with pytest.raises(HalfplateError, match=r"^layers\.0\.first: 1 of its 4 inputs are not finite"):
        collect_toy("shared", ["layers.0.first"], hidden)


def test_dead_inputs_have_zero_moments() -> None:
    hidden = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    hidden[..., 1] = 0
    found = collect_toy("shared", ["layers.0.first"], hidden)["layers.0.first"]
    assert found.require_diagonal()[1] == 0
    assert not found.require_gram()[1].any()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi"])
def test_stages_are_the_linears_of_one_input_in_order(tiny_model: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    blockwise = BlockwiseModel(model)
    names = names_of(model, 0)
    stages = input_stages(blockwise, 0, blockwise.embed(IDS), names[::-1])
    assert sorted(name for stage in stages for name in stage) == sorted(names)
    short = [sorted(name.rpartition(".")[2] for name in stage) for stage in stages]
    if architecture != "phi":  # whose attention and feed-forward share one input
        assert short == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_statistics_of_a_stage_are_those_of_the_whole_block(tiny_model: Any) -> None:
    model = tiny_model()
    blockwise = BlockwiseModel(model)
    inputs, names = [blockwise.embed(part) for part in IDS.split(2)], names_of(model, 0)
    whole, _ = collect_block(blockwise, 0, inputs, names, Statistic.GRAM)
    for stage in input_stages(blockwise, 0, inputs[0], names):
        for name, one in stage_sums(blockwise, 0, inputs, stage, Statistic.GRAM).statistics(stage).items():
            assert torch.equal(one.require_gram(), whole[name].require_gram())
            assert one.cross is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_cross_moment_is_that_of_both_inputs(tiny_model: Any) -> None:
    model, other = tiny_model(), tiny_model()
    blockwise = BlockwiseModel(model)
    dense = [blockwise.embed(part) for part in IDS.split(2)]
    inputs = [BlockInputs(1.1 * batch.hidden + 0.01, batch.arguments) for batch in dense]
    block = other.get_submodule(blockwise.prefix)[0]
    name = next(name for name in names_of(model, 0) if name.endswith("down_proj"))
    with torch.no_grad():
        model.get_submodule(name.replace("down", "up")).weight.mul_(0.9)
    seen: dict[str, list[Tensor]] = {"dense": [], "now": []}
    for key, module, batches, replacing in (
        ("dense", block.get_submodule(name.removeprefix(f"{blockwise.prefix}.0.")), dense, block),
        ("now", model.get_submodule(name), inputs, None),
    ):
        hook = module.register_forward_pre_hook(
            lambda _, args, key=key: seen[key].append(args[0].flatten(0, 1).double())
        )
        for batch in batches:
            blockwise.run_block(0, batch, replacing)
        hook.remove()
    original = BlockwiseModel(other)
    recorded = [recorded_inputs(original, 0, batch, [name])[0][name] for batch in dense]
    found = stage_sums(blockwise, 0, inputs, [name], Statistic.GRAM, recorded).statistics([name])[name]
    x, x_dense = torch.cat(seen["now"]), torch.cat(seen["dense"])
    assert found.cross is not None
    torch.testing.assert_close(found.cross, x_dense.T @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.require_gram(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def limited(x: Tensor, limit: float, dense: Tensor | None = None) -> Sums:
    sums = Sums()
    sums.add(x, Statistic.GRAM, dense, limit)
    return sums


def test_a_token_of_much_energy_counts_as_one_of_the_limit() -> None:
    x = torch.randn(21, 6, generator=torch.Generator().manual_seed(0))
    x[3] *= 1000
    dense = x + 0.1
    energies = x.square().sum(1)
    expected, crosses = torch.zeros(6, 6), torch.zeros(6, 6)
    for token, other in zip(x, dense, strict=True):
        share = min(1.0, 10 * float(energies.median()) / float(token.square().sum()))
        expected += share * torch.outer(token, token)
        crosses += share * torch.outer(other, token)
    found = limited(x, 10.0, dense)
    assert found.products is not None
    assert found.crosses is not None
    torch.testing.assert_close(found.products.float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.crosses.float(), crosses, rtol=1e-4, atol=1e-3)


def test_tokens_without_energy_do_not_silence_the_others() -> None:
    x = torch.zeros(20, 4)
    x[:5] = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    found = limited(x, 10.0)
    assert found.products is not None
    torch.testing.assert_close(found.products.float(), x.T @ x, rtol=1e-5, atol=1e-5)
    nothing = limited(torch.zeros(3, 4), 10.0)
    assert nothing.products is not None
    assert not nothing.products.any()
