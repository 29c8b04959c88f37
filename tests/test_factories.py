"""Every tensor that the package makes names its type and its device: a process may have other defaults than ours."""

import ast
from pathlib import Path

import pytest

import halfplate

FACTORIES = {"empty", "zeros", "ones", "full", "arange", "eye", "tensor", "as_tensor", "asarray", "scalar_tensor"} | {
    *("rand", "randn", "randint", "randperm", "linspace", "logspace", "range", "tril_indices", "triu_indices"),
}
MODULES = {"Linear", "Embedding"}  # of torch.nn


def unnamed(source: str) -> list[tuple[int, str]]:
    """Line and name of each call that leaves its type or its device to torch's defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        given = {keyword.arg for keyword in node.keywords}
        if None in given:  # **options, which a test cannot see through
            continue
        factory = owner == "torch" and node.func.attr in FACTORIES and not given >= {"dtype", "device"}
        # A module on the meta device holds nothing; its parameters are put in afterwards.
        module = owner == "nn" and node.func.attr in MODULES and "device" not in given
        if factory or module:
            found.append((node.lineno, f"{owner}.{node.func.attr}"))
    return found


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("torch.empty(3)", True),
        ("torch.zeros(3, dtype=torch.float32)", True),
        ("torch.arange(3, device='cpu')", True),
        ("torch.arange(3, dtype=torch.int64, device=x.device)", False),
        ("nn.Linear(2, 2)", True),
        ("x.new_empty(3)", False),
    ],
)
def test_the_check_sees_what_is_not_named(line, caught):
    assert bool(unnamed(line)) == caught


def test_every_factory_call_names_type_and_device():
    package = Path(halfplate.__file__).parent
    found = {str(file.relative_to(package)): unnamed(file.read_text()) for file in package.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == {}
