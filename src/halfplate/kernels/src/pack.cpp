#include "pack.h"

#include <atomic>
#include <cstring>

#include "layout.h"

namespace halfplate {
namespace {

float widen_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    float value;
    if (exponent == 0) {
        value = float(mantissa) * 0x1p-24f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Exact for numbers that came from widen_half.
uint16_t narrow_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 255;
    if (exponent < 113) {
        const float magnitude = value < 0 ? -value : value;
        return uint16_t(sign | uint32_t(magnitude * 0x1p24f));
    }
    return uint16_t(sign | (exponent - 112) << 10 | (bits >> 13 & 1023));
}

bool finite(int32_t kind, uint32_t bits) {
    switch (kind) {
        case FP32: return (bits & 0x7f800000u) != 0x7f800000u;
        case BF16: return (bits & 0x7f80u) != 0x7f80u;
        case FP16: return (bits & 0x7c00u) != 0x7c00u;
        default: return true;
    }
}

// The i-th value of a stored row as raw bits; codes become two's complement.
template <int32_t KIND>
inline uint32_t stored_value(const uint8_t *row, int64_t i) {
    if (KIND == FP32) {
        uint32_t bits;
        std::memcpy(&bits, row + 4 * i, 4);
        return bits;
    }
    if (KIND == BF16 || KIND == FP16) {
        uint16_t bits;
        std::memcpy(&bits, row + 2 * i, 2);
        return bits;
    }
    if (KIND == INT8) return uint8_t(row[i] ^ 0x80);
    if (KIND == FIVE) {
        const int64_t byte = 5 * i / 8, bit = 5 * i % 8;
        uint32_t code = uint32_t(row[byte] >> bit);
        if (bit > 3) code |= uint32_t(row[byte + 1]) << (8 - bit);
        return (code & 31) ^ 16;
    }
    return (row[i / 2] >> 4 * (i & 1) & 15) ^ 8;
}

template <int32_t KIND>
inline void store_value(uint8_t *row, int64_t i, uint32_t bits) {
    if (KIND == FP32) std::memcpy(row + 4 * i, &bits, 4);
    if (KIND == BF16 || KIND == FP16) {
        const uint16_t half = uint16_t(bits);
        std::memcpy(row + 2 * i, &half, 2);
    }
    if (KIND == INT8) row[i] = uint8_t(bits ^ 0x80);
    if (KIND == INT4) row[i / 2] = uint8_t((row[i / 2] & (15 << 4 * (1 - (i & 1)))) | (bits ^ 8) << 4 * (i & 1));
    if (KIND == FIVE) {
        const int64_t byte = 5 * i / 8, bit = 5 * i % 8;
        const uint32_t code = (bits ^ 16) << bit, clear = ~(31u << bit);
        row[byte] = uint8_t((row[byte] & clear) | code);
        if (bit > 3) row[byte + 1] = uint8_t((row[byte + 1] & clear >> 8) | code >> 8);
    }
}

template <int32_t KIND>
int64_t stored_row_bytes(int64_t count) {
    return KIND == FP32 ? 4 * count : KIND == INT8 ? count : KIND == INT4 ? ceil_div(count, 2) : KIND == FIVE ? ceil_div(5 * count, 8) : 2 * count;
}

// Position of element e of a step inside the values of a unit and tile: byte and bit. Of a code of 5 bits, that of its low 4 bits.
struct Slot {
    int64_t byte;
    int bit;
};

template <int32_t KIND, bool AS_BYTES>
inline Slot slot(int64_t step, int64_t e) {
    if (AS_BYTES) return KIND == INT8 ? Slot{64 * step + e, 0} : Slot{64 * (step / 2) + e, int(4 * (step & 1))};
    switch (KIND) {
        case FP32: return {64 * step + 4 * e, 0};
        case BF16: return {64 * (step / 2) + 4 * e + 2 * (step & 1), 0};
        case FP16: return {32 * step + 2 * e, 0};
        case INT8: return {16 * step + e, 0};
        default: return {64 * (step / 8) + 4 * e + (step & 7) / 2, int(4 * (step & 1))};
    }
}

template <int32_t KIND, bool AS_BYTES>
inline void put(uint8_t *values, int64_t step, int64_t e, uint32_t bits) {
    const Slot s = slot<KIND, AS_BYTES>(step, e);
    if (KIND == FP32) std::memcpy(values + s.byte, &bits, 4);
    if (KIND == BF16 || KIND == FP16) {
        const uint16_t half = uint16_t(bits);
        std::memcpy(values + s.byte, &half, 2);
    }
    if (KIND == INT8) values[s.byte] = uint8_t(bits);
    if (KIND == INT4 || KIND == FIVE) values[s.byte] = uint8_t(values[s.byte] | (bits & 15) << s.bit);
}

template <int32_t KIND, bool AS_BYTES>
inline uint32_t get(const uint8_t *values, int64_t step, int64_t e) {
    const Slot s = slot<KIND, AS_BYTES>(step, e);
    uint32_t bits = 0;
    if (KIND == FP32) std::memcpy(&bits, values + s.byte, 4);
    if (KIND == BF16 || KIND == FP16) std::memcpy(&bits, values + s.byte, 2);
    if (KIND == INT8) bits = values[s.byte];
    if (KIND == INT4 || KIND == FIVE) bits = values[s.byte] >> s.bit & 15;
    return bits;
}

// The fifth bit of a code; fifths: those of a tile.
inline void put_fifth(uint8_t *fifths, int64_t unit, int64_t step, int64_t e, uint32_t bits) {
    uint8_t &byte = fifths[slot<FIVE, false>(step, e).byte];
    byte = uint8_t(byte | (bits >> 4 & 1) << (2 * unit + (step & 1)));
}

inline uint32_t get_fifth(const uint8_t *fifths, int64_t unit, int64_t step, int64_t e) {
    return (fifths[slot<FIVE, false>(step, e).byte] >> (2 * unit + (step & 1)) & 1u) << 4;
}

// Step, element of the first of its values, and row of a group of 4 columns in a tile.
template <bool AS_BYTES>
inline void place_group(int64_t group, int64_t row, int64_t &step, int64_t &element) {
    const int64_t groups = AS_BYTES ? 16 : 4;  // of a step
    step = group / groups;
    group %= groups;
    element = AS_BYTES ? group / 4 * 16 + row * 8 + group % 4 * 2 : group * 4 + row * 2;
}

template <bool AS_BYTES>
inline void put_position(uint8_t *meta, int64_t step, int64_t e, uint32_t position) {
    if (AS_BYTES) {
        const int64_t lane = 4 * step + e / 16;
        uint8_t &byte = meta[16 * (lane & 1) + e % 16];
        byte = uint8_t(byte | position << 2 * (lane >> 1));
    } else {
        const int64_t bit = 2 * step;
        uint8_t &byte = meta[2 * e + bit / 8];
        byte = uint8_t(byte | position << bit % 8);
    }
}

template <bool AS_BYTES>
inline uint32_t get_position(const uint8_t *meta, int64_t step, int64_t e) {
    if (AS_BYTES) {
        const int64_t lane = 4 * step + e / 16;
        return meta[16 * (lane & 1) + e % 16] >> 2 * (lane >> 1) & 3;
    }
    const int64_t bit = 2 * step;
    return meta[2 * e + bit / 8] >> bit % 8 & 3;
}

// Visits the rows of one band; UNPACK reverses the direction.
template <int32_t KIND, bool AS_BYTES, bool UNPACK>
int32_t band_sparse(const Packed &p, const Stored &stored, uint8_t *band, int64_t first_row) {
    const int64_t kept = p.d_in / 2, weight_row = stored_row_bytes<KIND>(kept), index_row = ceil_div(kept, 4);
    const int64_t full = tile_bytes(p, TILE / step_columns(p));
    int32_t refusal = ACCEPTED;
    for (int64_t unit = 0; unit < UNITS; ++unit)
        for (int64_t r = 0; r < 2; ++r) {
            const int64_t row = first_row + 2 * unit + r;
            if (row >= p.d_out) continue;
            auto *weight = static_cast<uint8_t *>(stored.weight) + row * weight_row;
            auto *index = static_cast<uint8_t *>(stored.index) + row * index_row;
            for (int64_t tile = 0; tile < tiles(p); ++tile) {
                const int64_t first = tile * TILE / 4, last = p.d_in / 4 < first + 32 ? p.d_in / 4 : first + 32;
                const bool whole = tile + 1 < tiles(p);
                uint8_t *meta = band + tile * full + unit * META;
                uint8_t *values = band + tile * full + UNITS * META +
                                  unit * value_bytes(KIND, AS_BYTES, whole ? TILE / step_columns(p) : last_steps(p));
                for (int64_t group = first; group < last; ++group) {
                    int64_t step, e;
                    place_group<AS_BYTES>(group - first, r, step, e);
                    if (UNPACK) {
                        const uint32_t p0 = get_position<AS_BYTES>(meta, step, e);
                        const uint32_t p1 = get_position<AS_BYTES>(meta, step, e + 1);
                        index[group / 2] = uint8_t((index[group / 2] & (15 << 4 * (1 - (group & 1)))) |
                                                   (p0 | p1 << 2) << 4 * (group & 1));
                        store_value<KIND>(weight, 2 * group, get<KIND, AS_BYTES>(values, step, e));
                        store_value<KIND>(weight, 2 * group + 1, get<KIND, AS_BYTES>(values, step, e + 1));
                        continue;
                    }
                    const uint32_t both = index[group / 2] >> 4 * (group & 1);
                    const uint32_t p0 = both & 3, p1 = both >> 2 & 3;
                    const uint32_t v0 = stored_value<KIND>(weight, 2 * group);
                    const uint32_t v1 = stored_value<KIND>(weight, 2 * group + 1);
                    if (p0 >= p1) refusal = POSITIONS;
                    if (!finite(KIND, v0) || !finite(KIND, v1)) refusal = NOT_FINITE;
                    if (KIND == INT8 && (v0 == 0x80 || v1 == 0x80)) refusal = CODES;
                    put_position<AS_BYTES>(meta, step, e, p0);
                    put_position<AS_BYTES>(meta, step, e + 1, p1);
                    put<KIND, AS_BYTES>(values, step, e, v0);
                    put<KIND, AS_BYTES>(values, step, e + 1, v1);
                }
            }
            if (!UNPACK && kept % 4 && index[index_row - 1] >> 4) refusal = POSITIONS;
        }
    return refusal;
}

// The packing part of band_sparse for floats, in the order of the output, because it determines the loading time.
template <int32_t KIND>
int32_t band_of_floats(const Packed &p, const Stored &stored, uint8_t *band, int64_t first_row) {
    const int64_t kept = p.d_in / 2, weight_row = stored_row_bytes<KIND>(kept), index_row = ceil_div(kept, 4);
    const int64_t full = tile_bytes(p, 8), groups = p.d_in / 4;
    bool falling = false, endless = false, outside = false;
    for (int64_t tile = 0; tile < tiles(p); ++tile) {
        const int64_t steps = tile + 1 < tiles(p) ? 8 : last_steps(p), first = tile * TILE / 4;
        for (int64_t unit = 0; unit < UNITS; ++unit) {
            uint8_t *meta = band + tile * full + unit * META;
            uint8_t *values = band + tile * full + UNITS * META + unit * value_bytes(KIND, FLOAT, steps);
            for (int64_t r = 0; r < 2; ++r) {
                const int64_t row = first_row + 2 * unit + r;
                if (row >= p.d_out) continue;
                const auto *weight = static_cast<const uint8_t *>(stored.weight) + row * weight_row;
                const auto *index = static_cast<const uint8_t *>(stored.index) + row * index_row;
                uint16_t positions[4][2] = {};
                for (int64_t s = 0; s < steps; ++s)
                    for (int64_t lane = 0; lane < 4; ++lane) {
                        const int64_t group = first + 4 * s + lane;
                        if (group >= groups) break;
                        const uint32_t both = index[group / 2] >> 4 * (group & 1);
                        const uint32_t p0 = both & 3, p1 = both >> 2 & 3;
                        const uint32_t v0 = stored_value<KIND>(weight, 2 * group), v1 = stored_value<KIND>(weight, 2 * group + 1);
                        falling |= p0 >= p1;
                        endless |= !finite(KIND, v0) | !finite(KIND, v1);
                        outside |= KIND == INT8 && ((v0 == 0x80) | (v1 == 0x80));
                        positions[lane][0] = uint16_t(positions[lane][0] | p0 << 2 * s);
                        positions[lane][1] = uint16_t(positions[lane][1] | p1 << 2 * s);
                        put<KIND, false>(values, s, 4 * lane + 2 * r, v0);
                        put<KIND, false>(values, s, 4 * lane + 2 * r + 1, v1);
                    }
                for (int64_t lane = 0; lane < 4; ++lane) std::memcpy(meta + 8 * lane + 4 * r, positions[lane], 4);
                if (tile == 0 && kept % 4) falling |= index[index_row - 1] >> 4 != 0;
            }
        }
    }
    return falling ? POSITIONS : endless ? NOT_FINITE : outside ? CODES : ACCEPTED;
}

template <int32_t KIND, bool AS_BYTES, bool UNPACK>
int32_t band_dense(const Packed &p, const Stored &stored, uint8_t *band, int64_t first_row) {
    const int64_t weight_row = stored_row_bytes<KIND>(p.d_in), columns = step_columns(p);
    const int64_t full = tile_bytes(p, TILE / columns);
    int32_t refusal = ACCEPTED;
    for (int64_t unit = 0; unit < UNITS && first_row + unit < p.d_out; ++unit) {
        auto *weight = static_cast<uint8_t *>(stored.weight) + (first_row + unit) * weight_row;
        for (int64_t tile = 0; tile < tiles(p); ++tile) {
            const bool whole = tile + 1 < tiles(p);
            const int64_t size = value_bytes(KIND, AS_BYTES, whole ? TILE / columns : last_steps(p));
            uint8_t *values = band + tile * full + unit * size, *fifths = band + tile * full + UNITS * size;
            const int64_t last = p.d_in < (tile + 1) * TILE ? p.d_in : (tile + 1) * TILE;
            for (int64_t c = tile * TILE; c < last; ++c) {
                const int64_t step = c % TILE / columns, e = c % columns;
                if (UNPACK) {
                    const uint32_t bits = get<KIND, AS_BYTES>(values, step, e);
                    store_value<KIND>(weight, c, KIND == FIVE ? bits | get_fifth(fifths, unit, step, e) : bits);
                    continue;
                }
                const uint32_t value = stored_value<KIND>(weight, c);
                if (!finite(KIND, value)) refusal = NOT_FINITE;
                if (KIND == INT8 && value == 0x80) refusal = CODES;
                put<KIND, AS_BYTES>(values, step, e, value);
                if (KIND == FIVE) put_fifth(fifths, unit, step, e, value);
            }
        }
        const int64_t used = KIND == INT4 ? 4 * p.d_in % 8 : KIND == FIVE ? 5 * p.d_in % 8 : 0;  // bits of the last byte, or 0 if all are
        if (!UNPACK && used && weight[weight_row - 1] >> used) refusal = CODES;
    }
    return refusal;
}

template <bool UNPACK>
int32_t band_any(const Packed &p, const Stored &stored, uint8_t *band, int64_t first_row) {
#define CASE(KIND)                                                                                           \
    case KIND:                                                                                               \
        if (p.sparse && !UNPACK) return band_of_floats<KIND>(p, stored, band, first_row);                    \
        return p.sparse ? band_sparse<KIND, false, UNPACK>(p, stored, band, first_row)                       \
                        : band_dense<KIND, false, UNPACK>(p, stored, band, first_row)
#define CASE_BYTES(KIND)                                                                                     \
    if (p.activations == BYTES && kind == KIND)                                                              \
    return p.sparse ? band_sparse<KIND, true, UNPACK>(p, stored, band, first_row)                            \
                    : band_dense<KIND, true, UNPACK>(p, stored, band, first_row)
    const int32_t kind = p.kind == TABLE ? int32_t(INT4) : p.kind;  // both are codes of 4 bits
    CASE_BYTES(INT8);
    CASE_BYTES(INT4);
    switch (kind) {
        case FIVE: return band_dense<FIVE, false, UNPACK>(p, stored, band, first_row);
        CASE(FP32);
        CASE(BF16);
        CASE(FP16);
        CASE(INT8);
        default: CASE(INT4);
    }
#undef CASE
#undef CASE_BYTES
}

template <bool UNPACK>
int32_t band_scales(const Packed &p, const Stored &stored, uint16_t *band, int64_t first_row) {
    auto *scales = static_cast<uint16_t *>(stored.scales);
    int32_t refusal = ACCEPTED;
    for (int64_t row = first_row; row < first_row + band_rows(p) && row < p.d_out; ++row)
        for (int64_t place = 0; place < tiles(p) * tile_scales(p); ++place) {
            const int64_t column = place * p.group;
            if (column >= p.d_in) break;
            uint16_t &packed = band[place * band_rows(p) + row - first_row];
            uint16_t &file = scales[row * stored_scales(p) + place];
            if (UNPACK) file = packed;
            else {
                packed = file;
                if (!finite(FP16, file)) refusal = NOT_FINITE;
                else if (file > 0x8000) refusal = CODES;
            }
        }
    return refusal;
}

// One block of a wrapper: stored row-major (block, block), packed input by input.
template <int32_t KIND, bool UNPACK>
int32_t wrapper_block(uint8_t *packed, uint8_t *stored, int64_t block) {
    const int64_t vectors = wrapper_vectors(block);
    int32_t refusal = ACCEPTED;
    for (int64_t o = 0; o < block; ++o)
        for (int64_t j = 0; j < block; ++j) {
            const int64_t vector = o / 16, e = o % 16, from = o * block + j;
            // Two's complement bytes are stored as they are, unlike the codes of a core.
            if (KIND == FP32) {
                uint8_t *to = packed + 64 * (j * vectors + vector) + 4 * e;
                std::memcpy(UNPACK ? stored + 4 * from : to, UNPACK ? to : stored + 4 * from, 4);
            } else if (KIND == BF16 || KIND == FP16) {
                uint8_t *to = KIND == BF16 ? packed + 64 * (j / 2 * vectors + vector) + 4 * e + 2 * (j & 1)
                                           : packed + 32 * (j * vectors + vector) + 2 * e;
                std::memcpy(UNPACK ? stored + 2 * from : to, UNPACK ? to : stored + 2 * from, 2);
            } else {
                uint8_t &to = packed[16 * (j * vectors + vector) + e];
                if (UNPACK) stored[from] = to;
                else to = stored[from];
            }
            if (!UNPACK) {
                if (KIND == INT8 && stored[from] == 0x80) refusal = CODES;
                if (KIND != INT8 && !finite(KIND, stored_value<KIND>(stored, from))) refusal = NOT_FINITE;
            }
        }
    return refusal;
}

template <int32_t KIND, bool UNPACK>
int32_t wrapper_of(uint8_t *packed, uint8_t *blocks, uint8_t *tail, int64_t size, int64_t block) {
    const int64_t width = KIND == FP32 ? 4 : KIND == INT8 ? 1 : 2;
    const int64_t count = size / block, rest = size % block, stride = wrapper_block_bytes(KIND, block);
    int32_t refusal = ACCEPTED;
    for (int64_t i = 0; i < count; ++i)
        refusal |= wrapper_block<KIND, UNPACK>(packed + i * stride, blocks + i * block * block * width, block);
    if (rest) refusal |= wrapper_block<KIND, UNPACK>(packed + count * stride, tail, rest);
    return refusal ? (refusal & CODES ? refusal : NOT_FINITE) : ACCEPTED;
}

float wrapper_value(int32_t kind, const uint8_t *stored, int64_t i) {
    float value;
    uint32_t bits;
    switch (kind) {
        case FP32: std::memcpy(&value, stored + 4 * i, 4); return value;
        case BF16:
            bits = stored_value<BF16>(stored, i) << 16;
            std::memcpy(&value, &bits, 4);
            return value;
        case FP16: return widen_half(uint16_t(stored_value<FP16>(stored, i)));
        default: return float(int8_t(stored[i]));
    }
}

template <bool UNPACK>
int32_t diagonal(int32_t kind, float *packed, uint8_t *stored, int64_t size) {
    int32_t refusal = ACCEPTED;
    for (int64_t i = 0; i < size; ++i) {
        if (!UNPACK) {
            packed[i] = wrapper_value(kind, stored, i);
            if (kind != INT8 && !(packed[i] - packed[i] == 0)) refusal = NOT_FINITE;
            if (kind == INT8 && stored[i] == 0x80) refusal = CODES;
            continue;
        }
        uint32_t bits;
        std::memcpy(&bits, packed + i, 4);
        if (kind == FP32) store_value<FP32>(stored, i, bits);
        if (kind == BF16) store_value<BF16>(stored, i, bits >> 16);
        if (kind == FP16) store_value<FP16>(stored, i, narrow_half(packed[i]));
        if (kind == INT8) stored[i] = uint8_t(int8_t(packed[i]));
    }
    return refusal;
}

template <bool UNPACK>
int32_t wrapper(int32_t kind, uint8_t *packed, void *blocks, void *tail, int64_t size, int64_t block) {
    auto *from = static_cast<uint8_t *>(blocks), *rest = static_cast<uint8_t *>(tail);
    if (block == 1) return diagonal<UNPACK>(kind, reinterpret_cast<float *>(packed), from, size);
    switch (kind) {
        case FP32: return wrapper_of<FP32, UNPACK>(packed, from, rest, size, block);
        case BF16: return wrapper_of<BF16, UNPACK>(packed, from, rest, size, block);
        case FP16: return wrapper_of<FP16, UNPACK>(packed, from, rest, size, block);
        default: return wrapper_of<INT8, UNPACK>(packed, from, rest, size, block);
    }
}

// Scales of int8 wrappers are packed as fp32.
template <bool UNPACK>
int32_t wrapper_scales(float *packed, void *stored, int64_t size) {
    auto *halves = static_cast<uint16_t *>(stored);
    int32_t refusal = ACCEPTED;
    for (int64_t i = 0; i < size; ++i) {
        if (UNPACK) halves[i] = narrow_half(packed[i]);
        else {
            packed[i] = widen_half(halves[i]);
            if (!finite(FP16, halves[i])) refusal = NOT_FINITE;
            else if (halves[i] > 0x8000) refusal = CODES;
        }
    }
    return refusal;
}

template <bool UNPACK>
int32_t move(Packed &p, const Stored &stored, int64_t threads) {
    std::atomic<int32_t> refusal{ACCEPTED};
    auto *base = reinterpret_cast<uint8_t *>(&p);
    const int64_t count = bands(p);
    auto refuse = [&refusal](int32_t reason) {
        if (reason != ACCEPTED) refusal.store(reason);
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = 0; band < count; ++band) {
        uint8_t *target = base + p.core + band * band_bytes(p);
        if (!UNPACK) std::memset(target, 0, size_t(band_bytes(p)));
        refuse(band_any<UNPACK>(p, stored, target, band * band_rows(p)));
        if (p.scales) {
            auto *scales = reinterpret_cast<uint16_t *>(base + p.scales + band * band_scale_bytes(p));
            if (!UNPACK) std::memset(scales, 0, size_t(band_scale_bytes(p)));
            refuse(band_scales<UNPACK>(p, stored, scales, band * band_rows(p)));
        }
    }
    if (p.in_block) refuse(wrapper<UNPACK>(p.wrapper_kind, base + p.in_blocks, stored.in_blocks, stored.in_tail, p.d_in, p.in_block));
    if (p.out_block) refuse(wrapper<UNPACK>(p.wrapper_kind, base + p.out_blocks, stored.out_blocks, stored.out_tail, p.d_out, p.out_block));
    if (p.in_scales) refuse(wrapper_scales<UNPACK>(reinterpret_cast<float *>(base + p.in_scales), stored.in_scales, p.d_in));
    if (p.out_scales) refuse(wrapper_scales<UNPACK>(reinterpret_cast<float *>(base + p.out_scales), stored.out_scales, p.d_out));
    if (p.bias && stored.bias)
        std::memcpy(UNPACK ? stored.bias : base + p.bias, UNPACK ? base + p.bias : stored.bias, size_t(4 * p.d_out));
    return refusal.load();
}

}  // namespace

void place(Packed &p, bool bias) {
    p.magic = MAGIC;
    int64_t end = round_up(sizeof(Packed), 64);
    auto part = [&end](int64_t nbytes) {
        if (nbytes == 0) return int64_t(0);
        const int64_t start = end;
        end = round_up(end + nbytes, 64);
        return start;
    };
    const bool scaled = p.kind >= INT8, scaled_wrappers = p.wrapper_kind == INT8;
    p.in_blocks = part(wrapper_bytes(p.wrapper_kind, p.d_in, p.in_block));
    p.in_scales = part(scaled_wrappers && p.in_block ? 4 * round_up(p.d_in, 16) : 0);
    p.core = part(bands(p) * band_bytes(p));
    p.scales = part(scaled ? bands(p) * band_scale_bytes(p) : 0);
    p.out_blocks = part(wrapper_bytes(p.wrapper_kind, p.d_out, p.out_block));
    p.out_scales = part(scaled_wrappers && p.out_block ? 4 * round_up(p.d_out, 16) : 0);
    p.bias = part(bias ? 4 * round_up(p.d_out, 16) : 0);
    p.nbytes = end + 64;  // padding, because vectors may be read past the end of the last part
}

int32_t pack(Packed &packed, const Stored &stored, int64_t threads) {
    // The gaps between parts are never used, but equal linears should pack to equal bytes.
    auto *base = reinterpret_cast<uint8_t *>(&packed);
    const int64_t head = round_up(sizeof(Packed), 64);
    std::memset(base + head, 0, size_t((packed.core ? packed.core : packed.nbytes) - head));
    if (packed.core) {
        const int64_t end = packed.core + bands(packed) * band_bytes(packed);
        std::memset(base + end, 0, size_t(packed.nbytes - end));
    }
    return move<false>(packed, stored, threads);
}

void unpack(const Packed &packed, const Stored &stored, int64_t threads) {
    move<true>(const_cast<Packed &>(packed), stored, threads);
}

}  // namespace halfplate
