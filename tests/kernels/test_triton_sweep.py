"""The sweep in Triton, run by its interpreter on the CPU, against the sweep in torch; skips where Triton is missing."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from halfplate.kernels import triton
from halfplate.pattern import DENSE, Pattern

CHECK = """
import torch
from halfplate.kernels.triton import sweep
from halfplate.pattern import Pattern
from halfplate.solvers.armor.sweep import sweep_tiles

sweep.BLOCK = 16  # several blocks a row
# A width that no block divides; a dead row, a dead input; one Gram matrix for all tiles and one a tile.
for seed, (tiles, rows, cols, shared, whole) in enumerate(
    [(2, 3, 24, False, True), (1, 2, 16, True, True), (2, 4, 20, True, False), (2, 4, 36, False, False)]
):
    g = torch.Generator().manual_seed(seed)
    draw = (lambda *s: torch.randint(-3, 4, s, generator=g).float()) if whole else (lambda *s: torch.randn(*s, generator=g))
    core, error = draw(tiles, rows, cols), draw(tiles, rows, cols)
    core.view(tiles, rows, -1, 4)[..., 1::2] = 0
    a, b = draw(tiles, rows, rows), draw(1 if shared else tiles, cols, cols)
    a[:, :, 0] *= float(seed != 1)
    b[:, 0] *= float(seed != 2)
    out_gram, in_gram = a.mT @ a, (b @ b.mT).expand(tiles, -1, -1)
    kept = [core.clone(), error.clone()]
    expected = sweep_tiles(core, error, out_gram, in_gram, Pattern(2, 4))
    found = sweep.sweep_tiles(core, error, out_gram, in_gram)
    assert torch.equal(core, kept[0]) and torch.equal(error, kept[1]), "inputs were changed"
    assert torch.equal(found != 0, expected != 0), seed
    assert not torch.equal(found, core), seed
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_sweeps_as_torch_does():
    # The interpreter is chosen when triton is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_only_free_2_4_cores_have_a_kernel(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: object())
    assert triton.sweeps(Pattern(2, 4))
    assert not triton.sweeps(Pattern(4, 8))
    assert not triton.sweeps(DENSE)
    monkeypatch.setenv("HALFPLATE_TRITON", "0")
    assert not triton.sweeps(Pattern(2, 4))


def test_nothing_of_it_is_imported_with_halfplate():
    code = (
        "import halfplate, halfplate.solvers.armor.sweep, sys; print('halfplate.kernels.triton.sweep' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
