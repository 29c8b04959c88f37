"""The sweep over the core in torch: the reference for the native one and for the CUDA kernel."""

from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from halfplate.formats.quantizers import Quantizer
from halfplate.formats.quantizers.rounding import GROUP
from halfplate.kernels import triton
from halfplate.pattern import Pattern

MAX_MASKS = 256  # with more masks than this, a group only tries its own mask and all single swaps
RIDGE = 1e-6  # relative to the mean diagonal; the gain is measured without it


@dataclass(frozen=True)
class Levels:
    """A quantizer whose values are a scale times a number that the code determines, and the number of columns per scale."""

    quantizer: Quantizer
    group: int = GROUP


@dataclass(frozen=True, eq=False)
class Grid:
    """The quantised values of a core: scales, fp32 (T, r, ceil(c / levels.group)) with fp16 values, are fitted in place.

    off: whether the core is not quantised yet, so that every group must change.
    """

    steps: Tensor
    levels: Levels
    off: bool = False


def sweep_tiles(
    core: Tensor, error: Tensor, out_gram: Tensor, in_gram: Tensor, pattern: Pattern, grid: Grid | None = None
) -> Tensor:
    """Exact coordinate descent over all groups of S in each of T independent tiles, row by row.

    Returns the new core. A group takes the mask with the largest gain 2 qᵀv − vᵀCv, q = E/G_rr + S C, and is not changed if no
    mask has a larger gain than its current values (docs/armor.md). With a `grid`, the scale of each row and scale group is first
    fitted to its codes; then each group takes the best quantised values that are found.

    core: S, (T, r, c).
    error: E = Aᵀ R D Bᵀ, (T, r, c).
    out_gram: G = AᵀA, (T, r, r).
    in_gram: C = B D Bᵀ, (T, c, c).
    """
    if core.device.type == "cuda" and grid is None and triton.sweeps(pattern):
        from halfplate.kernels.triton.sweep import sweep_tiles as sweep_on_cuda  # imported here because it needs triton

        return sweep_on_cuda(core, error, out_gram, in_gram)
    core, error = core.clone(), error.clone()
    rows, width, m = core.shape[1], core.shape[2], pattern.m
    for r in range(rows):
        scale = out_gram[:, r, r]
        alive = scale > 0
        inverse = torch.where(alive, 1 / scale, 0)[:, None]
        before = error[:, r].clone()
        for start in range(0, width, m):
            if grid is not None and not grid.off and start % grid.levels.group == 0:
                columns = slice(start, min(start + grid.levels.group, width))
                moved = refit_steps(
                    grid.steps[:, r, start // grid.levels.group],
                    core[:, r, columns],
                    error[:, r, columns] * inverse,
                    in_gram[:, columns, columns],
                    grid.levels.quantizer,
                )
                error[:, r] -= (scale[:, None, None] * moved[:, None, :] @ in_gram[:, columns, :])[:, 0]
            group = slice(start, start + m)
            local = in_gram[:, group, group]
            old = core[:, r, group]
            pull = error[:, r, group] * inverse
            if grid is None:
                new = best_group(old, pull, local, pattern)
            else:
                steps = grid.steps[:, r, start // grid.levels.group]
                new = best_group_on_grid(old, pull, local, pattern, steps, grid.levels, may_stay=not grid.off)
            new = torch.where(alive[:, None], new, old)
            change = (new - old) * scale[:, None]
            error[:, r] -= (change[:, None, :] @ in_gram[:, group, :])[:, 0]
            core[:, r, group] = new
        moved = (before - error[:, r]) * inverse
        error[:, r + 1 :] -= out_gram[:, r + 1 :, r, None] * moved[:, None, :]
    return core


def best_group(old: Tensor, pull: Tensor, local: Tensor, pattern: Pattern) -> Tensor:
    """The best values of a group in each tile. old, pull (E/G_rr): (T, m); local (C of the group): (T, m, m)."""
    linear, stay = _linear(old, pull, local)
    masks = _masks(old, pattern).expand(old.shape[0], -1, -1)  # (T, masks, n)
    values, gains = (_pairs if pattern == Pattern(2, 4) else _solve)(linear, local, masks)
    new, gain = _best(old, masks, values, gains)
    return torch.where((gain > stay)[:, None], new, old)


def _linear(old: Tensor, pull: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """q = E/G_rr + S C of each group, (T, m), and the gain of its current values, (T,)."""
    # Sums have the same order as in the native code, so that ties are broken in the same way.
    members = range(old.shape[1])
    linear: Tensor = pull + sum(old[:, k, None] * local[:, k] for k in members)
    stay: Tensor = sum((old[:, k] * (linear[:, k] + pull[:, k]) for k in members), torch.zeros_like(old[:, 0]))
    return linear, stay


def _best(old: Tensor, masks: Tensor, values: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """The group (T, m) of the mask with the largest gain, and that gain (T,); of equal gains the first."""
    best = gains.argmax(1)
    take = torch.arange(len(old), dtype=torch.int64, device=old.device)
    new = torch.zeros_like(old).scatter(1, masks[take, best], values[take, best].to(old.dtype))
    return new, gains[take, best]


def refit_steps(steps: Tensor, values: Tensor, pull: Tensor, local: Tensor, quantizer: Quantizer) -> Tensor:
    """Give each row the best fp16 scale for its codes, if that lowers the loss; returns the change of `values`.

    steps: (T,), in place.
    values: (T, c), in place.
    pull: E/G_rr, (T, c).
    local: C of these columns, (T, c, c).
    """
    alive = steps != 0
    numbers = quantizer.nearest(values, steps[:, None])
    # The factors of the scale; a pruned value is 0, which the quantizer need not have.
    kept = values != 0
    codes = torch.where(kept, quantizer.decode(numbers, torch.ones_like(steps)[:, None]), 0)
    slope = (codes.double() * pull).sum(1)
    curvature = (codes.double()[:, None, :] @ local.double() @ codes.double()[:, :, None])[:, 0, 0]
    usable = alive & (curvature > 0)
    wished = (steps + torch.where(usable, slope / torch.where(usable, curvature, 1), 0)).float()
    fits = (wished >= 6.2e-5) & (wished <= 65504)  # the normal range of fp16
    rounded = torch.where(fits, wished, 1).half().float()
    change = rounded.double() - steps
    gains = usable & fits & (2 * change * slope - change.square() * curvature > 0)
    moved = torch.where(gains[:, None] & kept, quantizer.decode(numbers, rounded[:, None]) - values, 0).to(values.dtype)
    steps.copy_(torch.where(gains, rounded, steps))
    values += moved
    return moved


def best_group_on_grid(
    old: Tensor, pull: Tensor, local: Tensor, pattern: Pattern, steps: Tensor, levels: Levels, may_stay: bool = True
) -> Tensor:
    """`best_group` among quantised values with the scales (T,): for each mask, the values are rounded one after the other.

    The remaining values are solved again given the rounded ones. A pair of 2:4 is tried in both orders.
    """
    linear, stay = _linear(old, pull, local)
    masks = _masks(old, pattern).expand(old.shape[0], -1, -1)
    if pattern == Pattern(2, 4):
        masks = torch.cat([masks, masks.flip(2)], 1)
    values = _rounded(linear, local, masks, steps, levels)
    square, right = _systems(linear, local, masks)
    new, gain = _best(old, masks, values, _gains(values, square, right))
    return torch.where((gain > stay)[:, None], new, old) if may_stay else new


def _rounded(linear: Tensor, local: Tensor, masks: Tensor, steps: Tensor, levels: Levels) -> Tensor:
    """Quantised values for every mask in its order: fp64 (T, masks, n)."""
    left = (
        linear.double()[:, None].expand(-1, masks.shape[1], -1).clone()
    )  # q given the values rounded so far: (T, masks, m)
    values = torch.zeros(masks.shape, dtype=torch.float64, device=local.device)
    alive = steps != 0
    inverse = torch.where(alive, 1 / torch.where(alive, steps, 1), 0).double()[:, None]
    units = alive.double()[:, None]
    for k in range(masks.shape[2]):
        solved = _solve(left, local, masks[..., k:])[0][..., 0]
        # In units of the scale, by its fp32 reciprocal as in the native code.
        numbers = levels.quantizer.nearest(solved * inverse, units)
        values[..., k] = levels.quantizer.decode(numbers, steps.double()[:, None])
        take = torch.arange(len(local), dtype=torch.int64, device=local.device)[:, None]
        left -= values[..., k, None] * local.double()[take, masks[..., k]]
    return values


def _masks(old: Tensor, pattern: Pattern) -> Tensor:
    """Candidate masks as sorted positions, (1 or T, masks, n), in the order that breaks ties."""
    n, m = pattern.n, pattern.m
    if comb(m, n) <= MAX_MASKS:
        return torch.tensor(list(combinations(range(m), n)), dtype=torch.int64, device=old.device)[None]
    # The group's own mask has its non-zeros first, then zeros from the left.
    own = (old == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :n].sort(1).values  # (T, n)
    free_mask = torch.ones_like(old, dtype=torch.bool).scatter(1, own, False)
    free = free_mask.nonzero()[:, 1].reshape(old.shape[0], m - n)
    swaps = own[:, None, None, :].repeat(1, n, m - n, 1)  # (T, kept, free, n)
    for k in range(n):
        swaps[:, k, :, k] = free
    return torch.cat([own[:, None], swaps.flatten(1, 2).sort(2).values], 1)


def _pairs(linear: Tensor, local: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Values (T, 6, 2) and gains (T, 6) of the six masks of 2:4, in closed form."""
    a, b = masks[0, :, 0], masks[0, :, 1]
    c_aa, c_ab, c_bb = local[:, a, a], local[:, a, b], local[:, b, b]
    aa, ab, bb = c_aa.double(), c_ab.double(), c_bb.double()
    ridge = RIDGE * 0.5 * (aa + bb)
    determinant = (aa + ridge) * (bb + ridge) - ab * ab
    usable = determinant > 0
    divisor = torch.where(usable, determinant, 1)
    inverse_aa, inverse_ab, inverse_bb = (
        torch.where(usable, entry / divisor, 0).to(local.dtype) for entry in (bb + ridge, -ab, aa + ridge)
    )
    q_a, q_b = linear[:, a], linear[:, b]
    v_a, v_b = inverse_aa * q_a + inverse_ab * q_b, inverse_ab * q_a + inverse_bb * q_b
    w_a, w_b = c_aa * v_a + c_ab * v_b, c_ab * v_a + c_bb * v_b
    gains = v_a * ((q_a + q_a) - w_a) + v_b * ((q_b + q_b) - w_b)
    return torch.stack([v_a, v_b], -1), gains


def _solve(linear: Tensor, local: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Values (T, masks, n) and gains (T, masks) of any masks, in fp64."""
    square, right = _systems(linear, local, masks)
    trace = square.diagonal(dim1=-2, dim2=-1).mean(-1)
    usable = trace > 0
    ridge = torch.where(usable, RIDGE * trace, 1)
    regular = square + ridge[..., None, None] * torch.eye(masks.shape[2], dtype=torch.float64, device=local.device)
    factor, failed = torch.linalg.cholesky_ex(regular)
    values = torch.cholesky_solve(right[..., None], factor)[..., 0]
    values = torch.where((usable & (failed == 0))[..., None], values, 0)
    return values, _gains(values, square, right)


def _systems(linear: Tensor, local: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """C_MM (T, masks, n, n) and q_M (T, masks, n) of each mask, fp64. linear: q, (T, m), or (T, masks, m) with one per mask."""
    take = torch.arange(len(local), dtype=torch.int64, device=local.device)[:, None, None]
    square = local.double()[take[..., None], masks[..., :, None], masks[..., None, :]]
    each = linear.double().reshape(len(local), -1, local.shape[1]).expand(-1, masks.shape[1], -1)
    return square, each.gather(2, masks)


def _gains(values: Tensor, square: Tensor, right: Tensor) -> Tensor:
    """2 qᵀv − vᵀCv: (T, masks)."""
    return (values * (2 * right - (square @ values[..., None])[..., 0])).sum(-1)
