// Checks of the entry points before anything is read or written. Sizes of buffers are in bytes, so that a buffer of another
// element type has the wrong size. Everything is integer arithmetic on a few numbers.
#pragma once

#include <omp.h>

#include <cstring>
#include <initializer_list>

#include "armor.h"
#include "layout.h"
#include "pack.h"
#include "runtime.h"

namespace halfplate {

// Returned by every entry point; above 0 are the refusals of pack.h. Mirrored in kernels/native.py.
enum Status : int32_t { DONE = 0, NO_MEMORY = -1, BAD_HEADER = -2, BAD_SIZE = -3, BAD_NUMBER = -4 };

// Larger sizes could overflow in products; no matrix or batch that fits into memory reaches them.
constexpr int64_t LARGEST_SIDE = int64_t(1) << 26, LARGEST_BATCH = int64_t(1) << 30;
constexpr int64_t LARGEST_GROUP_CALL = 1 << 20;           // matrices of a grouped call
constexpr int64_t LARGEST_GROUP = 256, LARGEST_KEPT = 16;  // M, and the largest N that the solver supports
constexpr int64_t LARGEST_ROUNDS = int64_t(1) << 20;      // descents of a row, and sweeps of a descent
constexpr int64_t LARGEST_MULTIPLE = 255;                 // of a unit under a super-scale
constexpr int64_t THREADS_PER_CORE = 8;

static inline bool within(int64_t value, int64_t least, int64_t most) { return value >= least && value <= most; }

// The number of threads for a call that requests `threads`: limited for the process; results do not depend on it.
static inline int64_t team(int64_t threads) {
    static const int64_t most = THREADS_PER_CORE * omp_get_num_procs();
    return threads < most ? threads : most;
}

// A buffer of exactly this many bytes; an empty one may be null.
static inline bool holds(const void *data, int64_t bytes, int64_t wanted) {
    return bytes == wanted && (wanted == 0 || data != nullptr);
}

// Whether there are numbers only for the codes of the kind.
static inline bool sensible_table(const Packed &p) {
    const int64_t numbers = p.kind == FIVE ? 32 : p.kind == TABLE ? 16 : 0;
    for (int64_t code = 0; code < 32; ++code)
        if (code < numbers ? p.table[code] == -128 : p.table[code] != 0) return false;
    return true;
}

// Whether the sizes in a header can be those of a matrix.
static inline bool sensible(const Packed &p) {
    return within(p.d_out, 1, LARGEST_SIDE) && within(p.d_in, 1, LARGEST_SIDE) && within(p.kind, FP32, FIVE) && (p.group == 32 || p.group == 64 || p.group == TILE) &&
           within(p.sparse, 0, 1) && within(p.activations, FLOAT, p.kind >= INT8 ? MANY_BYTES : FLOAT) &&
           !(p.kind == FIVE && (p.sparse || p.activations == BYTES)) &&
           within(p.wrapper_kind, FP32, INT8) && within(p.out_block, 0, LARGEST_SIDE) &&
           within(p.in_block, 0, LARGEST_SIDE) && (!p.sparse || p.d_in % 4 == 0) && sensible_table(p);
}

// Whether `p` starts a packed matrix of `bytes` bytes. Cheap enough for every token.
static inline bool intact(const Packed *p, int64_t bytes) {
    return p != nullptr && bytes >= int64_t(sizeof(Packed)) && p->magic == MAGIC && p->nbytes == bytes;
}

// `intact`, and whether every part is at the offset that follows from the sizes of the matrix.
static inline bool sound(const Packed *p, int64_t bytes) {
    if (!intact(p, bytes) || !sensible(*p)) return false;
    Packed placed = *p;
    place(placed, p->bias != 0);
    return std::memcmp(&placed, p, sizeof placed) == 0;
}

// Rows of `columns` floats, `apart` floats apart, in a buffer that ends with the last of them.
static inline bool holds_rows(const float *data, int64_t bytes, int64_t rows, int64_t columns, int64_t apart) {
    return within(rows, 1, LARGEST_BATCH) && within(apart, rows == 1 ? 0 : columns, LARGEST_BATCH) &&
           holds(data, bytes, 4 * ((rows - 1) * apart + columns));
}

// Whether a member of a grouped call is a matrix of these inputs, and its rows and columns are inside input and output.
static inline int32_t check_member(const Member &m, int64_t x_rows, int64_t d_in, int64_t y_rows, int64_t width) {
    if (!sound(m.matrix, m.bytes)) return BAD_HEADER;
    if (m.matrix->d_in != d_in || m.matrix->d_out != m.d_out) return BAD_SIZE;
    const bool inside = within(m.tokens, 1, y_rows) && within(m.from, 0, x_rows - m.tokens) && within(m.to, 0, y_rows - m.tokens) &&
                        within(m.column, 0, width - m.d_out);
    return inside ? DONE : BAD_NUMBER;
}

// Whether the stored tensors are exactly those of the matrix, with the right sizes.
static inline bool holds_stored(const Packed &p, const Stored &s) {
    const int64_t kept = p.sparse ? p.d_in / 2 : p.d_in;
    const int64_t bits = p.kind == FP32 ? 32 : p.kind == INT8 ? 8 : p.kind == FIVE ? 5 : p.kind >= INT4 ? 4 : 16, row = ceil_div(bits * kept, 8);
    const int64_t width = p.wrapper_kind == FP32 ? 4 : p.wrapper_kind == INT8 ? 1 : 2;
    auto wrapper = [&](int64_t size, int64_t block, void *blocks, void *tail, void *scales, const int64_t *bytes) {
        const int64_t count = block ? size / block : 0, rest = block ? size % block : 0;
        return holds(blocks, bytes[0], count * block * block * width) &&
               holds(tail, bytes[1], rest * rest * width) &&
               holds(scales, bytes[2], block && p.wrapper_kind == INT8 ? 2 * size : 0);
    };
    return holds(s.weight, s.bytes[0], p.d_out * row) &&
           holds(s.index, s.bytes[1], p.sparse ? p.d_out * ceil_div(p.d_in / 4, 2) : 0) &&
           holds(s.scales, s.bytes[2], p.kind >= INT8 ? 2 * p.d_out * stored_scales(p) : 0) &&
           wrapper(p.d_out, p.out_block, s.out_blocks, s.out_tail, s.out_scales, s.bytes + 3) &&
           wrapper(p.d_in, p.in_block, s.in_blocks, s.in_tail, s.in_scales, s.bytes + 6) &&
           holds(s.bias, s.bytes[9], p.bias ? 4 * p.d_out : 0);
}

// Whether the matrices of a problem of the solver have the sizes that follow from its tiles.
static inline int32_t check_problem(const Problem &p, const double *losses, int64_t loss_bytes) {
    if (!within(p.row_tiles, 1, LARGEST_SIDE) || !within(p.row_tile, 1, LARGEST_SIDE) || !within(p.col_tiles, 1, LARGEST_SIDE) ||
        !within(p.col_tile, 1, LARGEST_SIDE) || !within(p.group, 1, LARGEST_GROUP) || !within(p.kept, 1, p.group < LARGEST_KEPT ? p.group : LARGEST_KEPT) ||
        p.col_tile % p.group || !within(p.row_tiles * p.row_tile, 1, LARGEST_SIDE) ||
        !within(p.col_tiles * p.col_tile, 1, LARGEST_SIDE))
        return BAD_NUMBER;
    const int64_t rows = p.row_tiles * p.row_tile, cols = p.col_tiles * p.col_tile;
    const bool fits = holds(p.weight, p.bytes[0], 4 * rows * cols) && holds(p.out_blocks, p.bytes[1], 4 * rows * p.row_tile) &&
                      holds(p.in_blocks, p.bytes[2], 4 * cols * p.col_tile) && holds(p.moment, p.bytes[3], 4 * cols) &&
                      holds(p.core, p.bytes[4], 4 * rows * cols) && holds(losses, loss_bytes, 8 * p.row_tiles * p.col_tiles);
    return fits ? DONE : BAD_SIZE;
}

static inline int32_t check_gram_sweep(const GramSweep &p) {
    if (!within(p.row_tiles, 1, LARGEST_SIDE) || !within(p.row_tile, 1, LARGEST_SIDE) || !within(p.cols, 1, LARGEST_SIDE) ||
        !within(p.row_tiles * p.row_tile, 1, LARGEST_SIDE) || !within(p.group, 1, LARGEST_GROUP) ||
        !within(p.kept, 1, p.group < LARGEST_KEPT ? p.group : LARGEST_KEPT) || p.cols % p.group || !within(p.off_grid, 0, 1))
        return BAD_NUMBER;
    const bool grid = p.steps != nullptr, table = p.table != nullptr;
    if (table && (!grid || !within(p.greatest - p.least, 1, LARGEST_TABLE - 1))) return BAD_NUMBER;
    if (grid && (!within(p.step_width, p.group, LARGEST_SIDE) || p.step_width % p.group || p.least > p.greatest)) return BAD_NUMBER;
    const int64_t rows = p.row_tiles * p.row_tile, matrix = 4 * rows * p.cols;
    const bool fits = holds(p.core, p.bytes[0], matrix) && holds(p.error, p.bytes[1], matrix) && holds(p.product, p.bytes[2], matrix) &&
                      holds(p.out_gram, p.bytes[3], 4 * rows * p.row_tile) && holds(p.in_gram, p.bytes[4], 4 * p.cols * p.cols) &&
                      holds(p.table, p.bytes[5], table ? 4 * (p.greatest - p.least + 1) : 0) &&
                      holds(p.steps, p.bytes[6], grid ? 4 * rows * ceil_div(p.cols, p.step_width) : 0);
    return fits ? DONE : BAD_SIZE;
}

// points: numbers that `losses` has room for.
static inline int32_t check_rows(const Rows &p, int64_t points) {
    const bool table = p.table != nullptr;
    if (!within(p.rows, 1, LARGEST_SIDE) || !within(p.cols, 1, LARGEST_SIDE) || !within(p.step_width, 1, LARGEST_SIDE) ||
        !within(p.rounds, 1, LARGEST_ROUNDS) || !within(p.sweeps, 0, LARGEST_ROUNDS) || p.least > p.greatest ||
        (table && !within(p.greatest - p.least, 1, LARGEST_TABLE - 1)))
        return BAD_NUMBER;
    const int64_t matrix = 4 * p.rows * p.cols, square = 4 * p.cols * p.cols;
    const bool fits = holds(p.wanted, p.bytes[0], matrix) && holds(p.gram, p.bytes[1], square) && holds(p.spread, p.bytes[2], square) &&
                      holds(p.order, p.bytes[3], 8 * p.cols) && holds(p.table, p.bytes[4], table ? 4 * (p.greatest - p.least + 1) : 0) &&
                      holds(p.steps, p.bytes[5], 4 * p.rows * ceil_div(p.cols, p.step_width)) && holds(p.values, p.bytes[6], matrix) &&
                      holds(p.losses, p.bytes[7], 8 * points);
    if (!fits) return BAD_SIZE;
    for (int64_t k = 0; k < p.cols; ++k)
        if (!within(p.order[k], 0, p.cols - 1)) return BAD_NUMBER;
    return DONE;
}

static inline int32_t check_affine_rows(const AffineRows &p) {
    const bool minima = p.minima != nullptr, units = p.step_units != nullptr, free = p.free_steps != nullptr;
    if (p.rows.rounds != 1 || !within(p.rows.rows, 1, LARGEST_SIDE) || !within(p.rows.sweeps, 0, LARGEST_ROUNDS) ||
        !within(p.most, units, LARGEST_MULTIPLE))
        return BAD_NUMBER;
    if (const int32_t bad = check_rows(p.rows, (p.rows.sweeps + 1) * p.rows.rows)) return bad;
    const int64_t each = p.rows.bytes[5];  // of the steps
    const bool fits = holds(p.minima, p.bytes[0], minima ? each : 0) && holds(p.step_units, p.bytes[1], units ? each : 0) &&
                      holds(p.minimum_units, p.bytes[2], minima && units ? each : 0) &&
                      holds(p.free_steps, p.bytes[3], free ? each : 0) && holds(p.free_minima, p.bytes[4], minima && free ? each : 0);
    return fits ? DONE : BAD_SIZE;
}

}  // namespace halfplate
