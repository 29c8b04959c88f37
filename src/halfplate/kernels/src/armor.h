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

struct Stages {
    const char *isa;
    Stage output_moments;  // cross, square: (row_tiles, row_tile, row_tile), R D Z' and Z D Z' with Z = S B
    Stage input_moments;   // cross, square: (col_tiles, col_tile, col_tile), T' R and T' T with T = A S
    Stage sweep;           // updates core; cross and square are not used
    void (*gram_sweep)(const GramSweep &);
};

extern const Stages stages_baseline, stages_avx2, stages_avx512;

}  // namespace halfplate
