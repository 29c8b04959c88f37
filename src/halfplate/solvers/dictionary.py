"""Sparse dictionaries: Z ≈ C · A with a few coefficients in each row of C."""

import torch
from torch import Tensor

ROWS = 256  # coded at once
RIDGE = 1e-8  # of the mean of the diagonal of normal equations


def principal(rows: Tensor, atoms: int) -> Tensor:
    """The first right singular vectors of `rows` (count, d), of unit norm: (atoms, d)."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:atoms].contiguous()


def largest_support(score: Tensor, kept: int) -> Tensor:
    """bool, true at the `kept` largest scores of each row, of equal ones the first."""
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def coefficients_on(rows: Tensor, atoms: Tensor, support: Tensor) -> Tensor:
    """The least-squares coefficients of each row on its atoms: (count, atoms), zero off the support."""
    kept = int(support[0].sum())
    places = (~support).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
    gram, products = atoms @ atoms.T, rows @ atoms.T
    found = torch.zeros_like(products)
    for start in range(0, len(rows), ROWS):
        part = places[start : start + ROWS]
        normal = gram[part[:, :, None], part[:, None, :]]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True) + 1e-300)
        solved = torch.linalg.solve(normal, products[start : start + ROWS].gather(1, part))
        found[start : start + ROWS].scatter_(1, part, solved)
    return found


def atoms_for(rows: Tensor, coefficients: Tensor) -> Tensor:
    """The least-squares atoms for given coefficients: (atoms, d)."""
    normal = coefficients.T @ coefficients
    normal.diagonal().add_(RIDGE * normal.diagonal().mean() + 1e-300)
    return torch.linalg.solve(normal, coefficients.T @ rows)


def pursued(rows: Tensor, atoms: Tensor, kept: int) -> Tensor:
    """bool (count, atoms): the support that orthogonal matching pursuit chooses for each row, one atom after another.

    Each step takes the atom that correlates most with what is left, and fits the coefficients of all atoms so far. The inverse of the
    normal equations grows by one row a step, by the block inverse. Source: Rubinstein et al., Efficient implementation of the K-SVD
    algorithm using batch orthogonal matching pursuit, 2008.
    """
    unit = atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-150)
    gram = unit @ unit.T
    support = torch.zeros(len(rows), len(atoms), dtype=torch.bool, device=rows.device)
    for start in range(0, len(rows), ROWS):
        products = rows[start : start + ROWS] @ unit.T
        count, each = len(products), torch.arange(len(products), dtype=torch.int64, device=rows.device)
        inverse = products.new_zeros(count, kept, kept)
        chosen = torch.zeros(count, kept, dtype=torch.int64, device=rows.device)
        taken = support[start : start + ROWS]
        left = products
        for step in range(kept):
            best = left.abs().masked_fill(taken, -1.0).argmax(1)
            taken[each, best], chosen[:, step] = True, best
            if step:
                beside = gram[chosen[:, :step], best[:, None]]  # (count, step)
                spread = (inverse[:, :step, :step] @ beside[:, :, None])[:, :, 0]
                pivot = (1.0 - (beside * spread).sum(1)).clamp_min(1e-10)
                inverse[:, :step, :step] += spread[:, :, None] * spread[:, None, :] / pivot[:, None, None]
                inverse[:, step, :step] = inverse[:, :step, step] = -spread / pivot[:, None]
                inverse[:, step, step] = 1.0 / pivot
            else:
                inverse[:, 0, 0] = 1.0
            here = chosen[:, : step + 1]
            solved = (inverse[:, : step + 1, : step + 1] @ products.gather(1, here)[:, :, None])[:, :, 0]
            full = torch.zeros_like(products).scatter_(1, here, solved)
            left = products - full @ gram
    return support


def updated_by_atom(rows: Tensor, atoms: Tensor, coefficients: Tensor, powers: int = 4) -> tuple[Tensor, Tensor]:
    """One K-SVD pass: each atom and its coefficients become the best rank-1 matrix for what the others leave, by power iterations.

    Source: Aharon et al., K-SVD, 2006.
    """
    atoms, coefficients = atoms.clone(), coefficients.clone()
    left = rows - coefficients @ atoms
    for atom in range(len(atoms)):
        users = coefficients[:, atom].nonzero()[:, 0]
        if not len(users):
            continue
        own = left[users] + coefficients[users, atom][:, None] * atoms[atom]
        weights = coefficients[users, atom]
        direction = atoms[atom]
        for _ in range(powers):
            direction = weights @ own
            direction = direction / direction.norm().clamp_min(1e-150)
            weights = own @ direction
        atoms[atom], coefficients[users, atom] = direction, weights
        left[users] = own - weights[:, None] * direction
    return atoms, coefficients
