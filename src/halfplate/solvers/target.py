"""The weight to approximate if the inputs come from compressed layers."""

import torch
from torch import Tensor


def corrected_weight(weight: Tensor, gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """W' = W + W (K − H)(H + λ)⁻¹, the best weight for the inputs from compressed layers if W is the weight for the original inputs.

    Up to a constant, ‖W X_original − Ŵ X‖² equals tr((W' − Ŵ) H (W' − Ŵ)ᵀ), so a solver for one set of inputs also handles two.
    Returns fp32, and W itself if H cannot be inverted.

    weight: fp32 (d_out, d_in).
    gram, cross: H = XᵀX / n of the current inputs and K = X_originalᵀ X / n, both (d_in, d_in).
    damping: λ as a fraction of the second moment of each input.
    """
    gram, cross = gram.double(), cross.double()
    diagonal = gram.diagonal()
    alive = diagonal > 0
    inputs = torch.where(alive, diagonal, 1.0).sqrt()
    shift = (weight.double() @ (cross - gram)) / inputs
    # In units of the second moment of each input, one damping suits all, also massive channels. In place, because in a wide layer
    # each matrix of this size takes more than its weight.
    scaled = (gram / inputs[:, None]).div_(inputs)
    scaled.diagonal().add_(torch.where(alive, damping, 1.0))
    factor, failed = torch.linalg.cholesky_ex(scaled)
    del scaled
    if int(failed):
        return weight
    change = torch.cholesky_solve(shift.T, factor).T / inputs
    return (weight + torch.where(alive, change, 0.0)).to(torch.float32)


def correcting_nbytes(weights: int, d_in: int) -> int:
    """Bytes that `corrected_weight` needs besides its arguments: fp64, two matrices (d_in, d_in) and three of `weights` values at once."""
    return torch.float64.itemsize * (2 * d_in**2 + 3 * weights)
