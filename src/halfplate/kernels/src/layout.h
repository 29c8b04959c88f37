// The layout of a packed linear, which is the same for every instruction set.
//
// A tile of a unit is [positions][values]. The columns of a tile are visited in steps: 16 columns where activations are
// floats, 64 where they are bytes. A step of a sparse unit holds 16 (or 64) kept values: for each group of 4 columns two
// of the upper row and two of the lower; a step of a dense unit holds as many columns of its one row.
//   floats: element e of a step belongs to group e / 4; its positions for 8 steps fill one 16-bit word, 2 bits a step.
//           Two steps of bf16 share 32-bit words (even step low), eight steps of int4 (two's complement) likewise.
//           FIVE: the low 4 bits of a code are where int4 has them. The fifth bits of all units of a tile follow their values: the one
//           of step s, element e and unit u is bit 2 u + s mod 2 of byte 4 e + s / 2, so that it is in the byte that has the low ones.
//   bytes:  lane l (16 bytes) of a tile covers columns 16 l to 16 l + 15: 8 values of the upper row, 8 of the lower;
//           their positions are bits 2 (l / 2) of byte 16 (l mod 2) + j. Two steps of int4 share bytes (even step low).
#pragma once

#include <cstdint>

#include "runtime.h"

namespace halfplate {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static inline int64_t unit_rows(const Packed &p) { return p.sparse ? 2 : 1; }
static inline int64_t band_rows(const Packed &p) { return UNITS * unit_rows(p); }
static inline int64_t bands(const Packed &p) { return ceil_div(p.d_out, band_rows(p)); }
static inline int64_t tiles(const Packed &p) { return ceil_div(p.d_in, TILE); }
static inline int64_t step_columns(const Packed &p) { return p.activations == BYTES ? 64 : 16; }
// Steps of the last tile; every other has TILE / step_columns.
static inline int64_t last_steps(const Packed &p) {
    return ceil_div(p.d_in - (tiles(p) - 1) * TILE, step_columns(p));
}
// Scales of a row in a tile, and in the stored form.
static inline int64_t tile_scales(const Packed &p) { return TILE / p.group; }
static inline int64_t stored_scales(const Packed &p) { return ceil_div(p.d_in, p.group); }
static inline int64_t band_scale_bytes(const Packed &p) { return 2 * tiles(p) * tile_scales(p) * band_rows(p); }
// Columns of an input that are read, including padding.
static inline int64_t padded_in(const Packed &p) { return round_up(p.d_in, step_columns(p)); }

static inline int64_t value_bytes(int32_t kind, int32_t activations, int64_t steps) {
    if (activations == BYTES) return kind == INT8 ? 64 * steps : 64 * ceil_div(steps, 2);
    switch (kind) {
        case FP32: return 64 * steps;
        case BF16: return 64 * ceil_div(steps, 2);
        case FP16: return 32 * steps;
        case INT8: return 16 * steps;
        default: return 64 * ceil_div(steps, 8);
    }
}

// Of the fifth bits of a tile.
constexpr int64_t FIFTH_BITS = 64;

static inline int64_t meta_bytes(const Packed &p) { return p.sparse ? META : 0; }
static inline int64_t tile_bytes(const Packed &p, int64_t steps) {
    return UNITS * (meta_bytes(p) + value_bytes(p.kind, p.activations, steps)) + (p.kind == FIVE ? FIFTH_BITS : 0);
}
static inline int64_t band_bytes(const Packed &p) {
    return (tiles(p) - 1) * tile_bytes(p, TILE / step_columns(p)) + tile_bytes(p, last_steps(p));
}

static inline const uint8_t *at(const Packed &p, int64_t offset) {
    return reinterpret_cast<const uint8_t *>(&p) + offset;
}

// A wrapper's block holds, for each input of the block in turn, its outputs in vectors of 16. Diagonal wrappers (blocks
// of 1) are one fp32 vector instead.
static inline int64_t wrapper_vectors(int64_t block) { return ceil_div(block, 16); }
static inline int64_t wrapper_block_bytes(int32_t kind, int64_t block) {
    const int64_t vectors = wrapper_vectors(block);
    switch (kind) {
        case FP32: return 64 * vectors * block;
        case BF16: return 64 * vectors * ceil_div(block, 2);
        case FP16: return round_up(32 * vectors * block, 64);
        default: return round_up(16 * vectors * block, 64);
    }
}
static inline int64_t wrapper_bytes(int32_t kind, int64_t size, int64_t block) {
    if (block == 0) return 0;
    if (block == 1) return 4 * round_up(size, 16);
    const int64_t rest = size % block;
    return size / block * wrapper_block_bytes(kind, block) + (rest ? wrapper_block_bytes(kind, rest) : 0);
}

}  // namespace halfplate
