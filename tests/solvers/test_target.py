"""The weight for compressed inputs."""

import torch

from halfplate.solvers.target import corrected_weight


def streams(d_in, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(40 * d_in, d_in, generator=generator).double() * torch.logspace(-2, 2, d_in)
    mix = torch.eye(d_in).double() + 0.1 * torch.randn(d_in, d_in, generator=generator)
    return dense, dense @ mix + noise * torch.randn(dense.shape, generator=generator)


def moments(dense, compressed):
    return compressed.T @ compressed / len(dense), dense.T @ compressed / len(dense)


def test_it_is_the_least_squares_weight():
    dense, compressed = streams(12, seed=1, noise=0.3)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    found = corrected_weight(weight, *moments(dense, compressed), damping=0.0)
    best = torch.linalg.lstsq(compressed, dense @ weight.double().T).solution.T
    assert torch.allclose(found.double(), best, rtol=1e-4, atol=1e-6)


def test_equal_inputs_change_nothing():
    dense, _ = streams(12, seed=1, noise=0)
    weight = torch.randn(5, 12)
    gram, cross = moments(dense, dense)
    assert torch.allclose(corrected_weight(weight, gram, cross, 0.01), weight, atol=1e-6)


def test_loss_differs_by_a_constant():
    dense, compressed = streams(12, seed=3, noise=0.3)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    gram, cross = moments(dense, compressed)
    target = corrected_weight(weight, gram, cross, 0.0).double()
    gaps = []
    for seed in range(3):
        trial = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).double()
        joint = (dense @ weight.double().T - compressed @ trial.T).square().sum() / len(dense)
        gaps.append(float(joint - (((target - trial) @ gram) * (target - trial)).sum()))
    assert max(gaps) - min(gaps) < 1e-2 * abs(gaps[0])


def test_dead_inputs_keep_their_weight():
    dense, compressed = streams(12, seed=5, noise=0.1)
    compressed[:, 3] = 0
    weight = torch.randn(5, 12)
    found = corrected_weight(weight, *moments(dense, compressed), damping=0.01)
    assert bool(found.isfinite().all())
    assert torch.equal(found[:, 3], weight[:, 3])
