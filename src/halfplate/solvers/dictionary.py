"""Sparse dictionaries: Z ≈ C · A with a few coefficients in each row of C."""

import torch
from torch import Tensor

ROWS, VALUES = 128, 1 << 25  # rows coded at once at most, and values that they take meanwhile
RIDGE = 1e-8  # of the mean of the diagonal of normal equations


def principal(rows: Tensor, atoms: int) -> Tensor:
    """The first right singular vectors of `rows` (count, d), of unit norm: (atoms, d)."""
    _, _, vh = torch.linalg.svd(rows, full_matrices=False)
    found: Tensor = vh[:atoms].contiguous()
    return found


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
    step = _rows_at_once(kept * kept)
    for start in range(0, len(rows), step):
        part = places[start : start + step]
        normal = gram[part[:, :, None], part[:, None, :]]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True) + 1e-300)
        wanted = products[start : start + step].gather(1, part)[:, :, None]
        solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(normal))[:, :, 0]
        found[start : start + step].scatter_(1, part, solved)
    return found


def atoms_for(rows: Tensor, coefficients: Tensor) -> Tensor:
    """The least-squares atoms for given coefficients: (atoms, d)."""
    normal = coefficients.T @ coefficients
    normal.diagonal().add_(RIDGE * normal.diagonal().mean() + 1e-300)
    found: Tensor = torch.linalg.solve(normal, coefficients.T @ rows)
    return found


def pursued(rows: Tensor, atoms: Tensor, kept: int) -> Tensor:
    """bool (count, atoms): the support that orthogonal matching pursuit chooses for each row, one atom after another.

    Each step takes the atom that correlates most with what is left, and removes from all correlations what that atom explains beyond
    those before it (Gram-Schmidt in the space of correlations). In fp32. Source: Rubinstein et al., Efficient implementation of the
    K-SVD algorithm using batch orthogonal matching pursuit, 2008.
    """
    unit = (atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-150)).float()
    sizes = rows.norm(dim=1, keepdim=True).clamp_min(1e-150)
    gram, whole = unit @ unit.T, (rows / sizes).float() @ unit.T
    support = torch.zeros(len(rows), len(atoms), dtype=torch.bool, device=rows.device)
    together = _rows_at_once(kept * len(atoms))
    for start in range(0, len(rows), together):
        left, taken = whole[start : start + together].clone(), support[start : start + together]
        each = torch.arange(len(left), dtype=torch.int64, device=rows.device)
        explained = left.new_empty(len(left), kept, len(atoms))
        for step in range(kept):
            best = left.abs().masked_fill(taken, -1.0).argmax(1)
            taken[each, best] = True
            before = explained[:, :step]
            direction = gram[best] - (before[each, :, best][:, None, :] @ before)[:, 0]
            size = direction[each, best].clamp_min(1e-6).sqrt()
            direction = direction / size[:, None]
            left -= (left[each, best] / size)[:, None] * direction
            explained[:, step] = direction
    return support


def _rows_at_once(values: int) -> int:
    """How many rows of so many values each are coded at once."""
    return max(min(ROWS, VALUES // values), 1)


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
