"""The sweep over a 2:4 core, with one program per tile; `halfplate.solvers.armor.sweep` has the torch reference."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

RIDGE = tl.constexpr(1e-6)  # as in the reference
BLOCK = 1024  # columns of a row of the error that are updated at once


@triton.jit
def _pair(q_a, q_b, c_aa, c_ab, c_bb):
    """Values of one mask in closed form, and their gain."""
    aa, ab, bb = c_aa.to(tl.float64), c_ab.to(tl.float64), c_bb.to(tl.float64)
    ridge = RIDGE * 0.5 * (aa + bb)
    determinant = (aa + ridge) * (bb + ridge) - ab * ab
    usable = determinant > 0
    divisor = tl.where(usable, determinant, 1.0)
    inverse_aa = tl.where(usable, (bb + ridge) / divisor, 0.0).to(tl.float32)
    inverse_ab = tl.where(usable, -ab / divisor, 0.0).to(tl.float32)
    inverse_bb = tl.where(usable, (aa + ridge) / divisor, 0.0).to(tl.float32)
    v_a = inverse_aa * q_a + inverse_ab * q_b
    v_b = inverse_ab * q_a + inverse_bb * q_b
    w_a = c_aa * v_a + c_ab * v_b
    w_b = c_ab * v_a + c_bb * v_b
    return v_a, v_b, v_a * ((q_a + q_a) - w_a) + v_b * ((q_b + q_b) - w_b)


@triton.jit
def _sweep(
    core, error, before, out_gram, in_gram, in_stride, rows: tl.constexpr, cols: tl.constexpr, BLOCK: tl.constexpr
):
    """core, error: (tiles, rows, cols), in place. before: (tiles, cols), scratch. in_stride: 0 if tiles share `in_gram`."""
    tile = tl.program_id(0).to(tl.int64)
    core += tile * rows * cols
    error += tile * rows * cols
    before += tile * cols
    out_gram += tile * rows * rows
    in_gram += tile * in_stride
    chunk = tl.arange(0, BLOCK)
    for r in range(rows):
        row, values = error + r * cols, core + r * cols
        scale = tl.load(out_gram + r * rows + r)
        # A row that affects no output is not changed, and changes no other.
        if scale > 0:
            inverse = 1.0 / scale
            for first in range(0, cols, BLOCK):
                inside = first + chunk < cols
                tl.store(before + first + chunk, tl.load(row + first + chunk, mask=inside), mask=inside)
            for start in range(0, cols, 4):
                tl.debug_barrier()  # the error was written by other threads
                line_0 = in_gram + start * cols
                line_1, line_2, line_3 = line_0 + cols, line_0 + 2 * cols, line_0 + 3 * cols
                c_00, c_01 = tl.load(line_0 + start), tl.load(line_0 + start + 1)
                c_02, c_03 = tl.load(line_0 + start + 2), tl.load(line_0 + start + 3)
                c_11, c_12 = tl.load(line_1 + start + 1), tl.load(line_1 + start + 2)
                c_13, c_22 = tl.load(line_1 + start + 3), tl.load(line_2 + start + 2)
                c_23, c_33 = tl.load(line_2 + start + 3), tl.load(line_3 + start + 3)
                o_0, o_1 = tl.load(values + start), tl.load(values + start + 1)
                o_2, o_3 = tl.load(values + start + 2), tl.load(values + start + 3)
                p_0, p_1 = tl.load(row + start) * inverse, tl.load(row + start + 1) * inverse
                p_2, p_3 = tl.load(row + start + 2) * inverse, tl.load(row + start + 3) * inverse
                q_0 = p_0 + (((o_0 * c_00 + o_1 * c_01) + o_2 * c_02) + o_3 * c_03)
                q_1 = p_1 + (((o_0 * c_01 + o_1 * c_11) + o_2 * c_12) + o_3 * c_13)
                q_2 = p_2 + (((o_0 * c_02 + o_1 * c_12) + o_2 * c_22) + o_3 * c_23)
                q_3 = p_3 + (((o_0 * c_03 + o_1 * c_13) + o_2 * c_23) + o_3 * c_33)
                # The gain of the current values; another mask must gain more, and of equal ones the first is chosen.
                gain = ((o_0 * (q_0 + p_0) + o_1 * (q_1 + p_1)) + o_2 * (q_2 + p_2)) + o_3 * (q_3 + p_3)
                n_0, n_1, n_2, n_3 = o_0, o_1, o_2, o_3
                zero = o_0 * 0.0
                v_a, v_b, found = _pair(q_0, q_1, c_00, c_01, c_11)
                more = found > gain
                n_0, n_1 = tl.where(more, v_a, n_0), tl.where(more, v_b, n_1)
                n_2, n_3, gain = tl.where(more, zero, n_2), tl.where(more, zero, n_3), tl.where(more, found, gain)
                v_a, v_b, found = _pair(q_0, q_2, c_00, c_02, c_22)
                more = found > gain
                n_0, n_2 = tl.where(more, v_a, n_0), tl.where(more, v_b, n_2)
                n_1, n_3, gain = tl.where(more, zero, n_1), tl.where(more, zero, n_3), tl.where(more, found, gain)
                v_a, v_b, found = _pair(q_0, q_3, c_00, c_03, c_33)
                more = found > gain
                n_0, n_3 = tl.where(more, v_a, n_0), tl.where(more, v_b, n_3)
                n_1, n_2, gain = tl.where(more, zero, n_1), tl.where(more, zero, n_2), tl.where(more, found, gain)
                v_a, v_b, found = _pair(q_1, q_2, c_11, c_12, c_22)
                more = found > gain
                n_1, n_2 = tl.where(more, v_a, n_1), tl.where(more, v_b, n_2)
                n_0, n_3, gain = tl.where(more, zero, n_0), tl.where(more, zero, n_3), tl.where(more, found, gain)
                v_a, v_b, found = _pair(q_1, q_3, c_11, c_13, c_33)
                more = found > gain
                n_1, n_3 = tl.where(more, v_a, n_1), tl.where(more, v_b, n_3)
                n_0, n_2, gain = tl.where(more, zero, n_0), tl.where(more, zero, n_2), tl.where(more, found, gain)
                v_a, v_b, found = _pair(q_2, q_3, c_22, c_23, c_33)
                more = found > gain
                n_2, n_3 = tl.where(more, v_a, n_2), tl.where(more, v_b, n_3)
                n_0, n_1 = tl.where(more, zero, n_0), tl.where(more, zero, n_1)
                tl.debug_barrier()  # all threads have read the group
                tl.store(values + start, n_0)
                tl.store(values + start + 1, n_1)
                tl.store(values + start + 2, n_2)
                tl.store(values + start + 3, n_3)
                d_0, d_1 = (n_0 - o_0) * scale, (n_1 - o_1) * scale
                d_2, d_3 = (n_2 - o_2) * scale, (n_3 - o_3) * scale
                for first in range(0, cols, BLOCK):
                    at = first + chunk
                    inside = at < cols
                    moved = d_0 * tl.load(line_0 + at, mask=inside) + d_1 * tl.load(line_1 + at, mask=inside)
                    moved += d_2 * tl.load(line_2 + at, mask=inside) + d_3 * tl.load(line_3 + at, mask=inside)
                    tl.store(row + at, tl.load(row + at, mask=inside) - moved, mask=inside)
            tl.debug_barrier()
            for first in range(0, cols, BLOCK):
                at = first + chunk
                inside = at < cols
                moved = (tl.load(before + at, mask=inside) - tl.load(row + at, mask=inside)) * inverse
                for later in range(r + 1, rows):
                    share = tl.load(out_gram + later * rows + r)
                    place = error + later * cols + at
                    tl.store(place, tl.load(place, mask=inside) - share * moved, mask=inside)
            tl.debug_barrier()


def sweep_tiles(core: Tensor, error: Tensor, out_gram: Tensor, in_gram: Tensor) -> Tensor:
    """`halfplate.solvers.armor.sweep.sweep_tiles` for a 2:4 core without quantisation: fp32 tensors on one device.

    Returns the new core.

    core, error: (T, r, c).
    out_gram: (T, r, r).
    in_gram: (T, c, c), or a tensor expanded to T.
    """
    tiles, rows, cols = core.shape
    core, error = core.clone(memory_format=torch.contiguous_format), error.clone(memory_format=torch.contiguous_format)
    if in_gram.stride()[1:] != (cols, 1):
        in_gram = in_gram.contiguous()
    before = torch.empty(tiles, cols, dtype=torch.float32, device=core.device)
    block = min(BLOCK, triton.next_power_of_2(cols))
    _sweep[(tiles,)](core, error, before, out_gram.contiguous(), in_gram, in_gram.stride(0), rows, cols, BLOCK=block)
    return core
