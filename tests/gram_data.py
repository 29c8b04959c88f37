"""Weights and Gram matrices for tests of solvers, and the error of a result."""

import torch


def inputs_of(d_in, seed, dead=0):
    """A Gram matrix of correlated inputs of very unequal size, its first `dead` inputs always 0: fp64 (d_in, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator).double() / d_in**0.5 + torch.eye(d_in)
    x = torch.randn(3 * d_in, d_in, generator=generator).double() @ mix
    x *= 10 ** (2 * torch.rand(d_in, generator=generator).double() - 1)
    x[:, :dead] = 0
    return x.T @ x / len(x)


def weight_of(d_out, d_in, seed):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed + 1))


def true_error(weight, matrix, gram):
    def loss(difference):
        return float(((difference.double() @ gram) * difference.double()).sum())

    return loss(weight - matrix) / loss(weight)
