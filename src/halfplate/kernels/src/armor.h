// The native half of ARMOR's exact solver: a plain C ABI over raw pointers, no Python and no torch headers.
#pragma once

#include <cstdint>

namespace halfplate {

// A padded problem of row_tiles x col_tiles independent tiles. All matrices are row-major and contiguous.
struct Problem {
    const float *weight;      // (rows, cols), rows = row_tiles * row_tile, cols = col_tiles * col_tile
    const float *out_blocks;  // A: (row_tiles, row_tile, row_tile)
    const float *in_blocks;   // B: (col_tiles, col_tile, col_tile)
    const float *moment;      // d: (cols), second moment of each input
    float *core;              // S: (rows, cols) with its zeros
    int64_t row_tiles, row_tile, col_tiles, col_tile;
    int64_t kept, group;      // N, M
    int64_t threads;
    int64_t bytes[5];         // of weight, out_blocks, in_blocks, moment and core
};

// Every stage also writes the loss of each tile on entry: double (row_tiles, col_tiles).
using Stage = void (*)(const Problem &, double *cross, double *square, double *losses);

constexpr int64_t LARGEST_TABLE = 32;  // numbers of a grid that are listed

// The core under the full Gram objective: every row couples all its inputs. Matrices as above.
struct GramSweep {
    float *core;            // S: (rows, cols), updated
    float *error;           // E = A' R H B': (rows, cols), overwritten
    float *product;         // U = S C: (rows, cols), updated with S
    const float *out_gram;  // G = A' A: (row_tiles, row_tile, row_tile)
    const float *in_gram;   // C = B H B': (cols, cols)
    const float *table;     // numbers that a step is multiplied by, rising, one a code; null where these are the codes themselves
    float *steps;           // of the grid, (rows, ceil(cols / step_width)), refitted where that gains; null for any real value
    int64_t row_tiles, row_tile, cols;
    int64_t kept, group;              // N, M
    int64_t least, greatest;          // range of the codes
    int64_t step_width;               // columns that share a scale; a multiple of M
    int64_t off_grid;                 // 1 if S is not quantised yet, so that every group must change
    int64_t threads;
    int64_t bytes[7];                 // of core, error, product, out_gram, in_gram, table and steps
};

// A quantised core without wrappers: every row minimises (w - s) C (w - s)' over codes and steps. Matrices as above.
struct Rows {
    const float *wanted;    // W: (rows, cols)
    const float *gram;      // C: (cols, cols)
    const float *spread;    // (cols, cols) in the order of rounding: what an error of 1 in a column takes from later ones
    const int64_t *order;   // the columns in the order of rounding: (cols)
    const float *table;     // as in GramSweep
    float *steps;           // the first steps, then the best: (rows, ceil(cols / step_width))
    float *values;          // the quantised rows: (rows, cols)
    double *losses;         // of all rows: at the first start, after each sweep of the first descent, after each other descent
    int64_t rows, cols;
    int64_t least, greatest, step_width;  // as in GramSweep
    int64_t rounds, sweeps;               // descents, and sweeps of each
    int64_t threads;
    int64_t bytes[8];       // of wanted, gram, spread, order, table, steps, values and losses
};

// One descent of rows whose values are a number times a step plus a minimum, with steps and minima that can be stored.
struct AffineRows {
    Rows rows;                  // `rounds` is 1; `losses` are (1 + sweeps, rows), of each row at the start and after each sweep
    float *minima;              // the first ones, then the best, shaped like steps; null if there are none
    const float *step_units;    // what each step is a multiple of, shaped like steps; null for any number of fp16
    const float *minimum_units; // what the size of each minimum, 0 or less, is a multiple of; null as step_units is, and without minima
    float *free_steps;          // the best for the codes at the end, storable or not, shaped like steps; null if not wanted
    float *free_minima;         // likewise
    int64_t most;               // the largest multiple
    int64_t bytes[5];           // of minima, step_units, minimum_units, free_steps and free_minima
};

struct Stages {
    const char *isa;
    Stage output_moments;  // cross, square: (row_tiles, row_tile, row_tile), R D Z' and Z D Z' with Z = S B
    Stage input_moments;   // cross, square: (col_tiles, col_tile, col_tile), T' R and T' T with T = A S
    Stage sweep;           // updates core; cross and square are not used
    void (*gram_sweep)(const GramSweep &);
    void (*rows)(const Rows &);
    void (*affine_rows)(const AffineRows &);
};

extern const Stages stages_baseline, stages_avx2, stages_avx512;

}  // namespace halfplate
