"""The shares of real sizes in the table of architectures."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from default_sizes import default_share  # (benchmarks are no package)


@pytest.mark.parametrize(("kind", "least", "most"), [("mixtral", 0.99, 1.0), ("jetmoe", 0.8, 0.82)])
def test_shares_are_those_of_the_default_configuration(kind, least, most):
    assert least < default_share(kind, False) <= most
