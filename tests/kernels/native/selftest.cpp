// The kernels against a naive reference, without Python: for sanitizers and for processors that only an emulator has
// (run.sh). Prints the number of cases and ends with 1 at the first one that is wrong.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "armor.h"
#include "layout.h"
#include "pack.h"
#include "runtime.h"

extern "C" {
int32_t halfplate_place(halfplate::Packed *, int32_t);
int32_t halfplate_pack(halfplate::Packed *, int64_t, const halfplate::Stored *, int64_t);
int32_t halfplate_unpack(const halfplate::Packed *, int64_t, const halfplate::Stored *, int64_t);
int32_t halfplate_linear(const halfplate::Packed *, int64_t, const float *, int64_t, int64_t, float *, int64_t, int64_t, int64_t);
int32_t halfplate_group(const halfplate::Member *, int64_t, int64_t, const float *, int64_t, int64_t, int64_t, int64_t, float *, int64_t, int64_t, int64_t, int64_t);
int32_t halfplate_wrap(const halfplate::Packed *, int64_t, int32_t, const float *, int64_t, int64_t, float *, int64_t, int64_t, int64_t);
int32_t halfplate_expand(const halfplate::Packed *, int64_t, void *, int64_t, int32_t, int64_t);
int64_t halfplate_decoder_scratch(halfplate::Decoder *, int64_t);
int32_t halfplate_step_batch(const halfplate::Decoder *, const halfplate::Batch *, int64_t);
int32_t halfplate_draw(const float *, int64_t, int64_t, int64_t, float, const double *, int64_t, int64_t *, int64_t, int64_t);
int32_t halfplate_step(const halfplate::Decoder *, const float *, int64_t, int64_t, float *, int64_t, int64_t);
int32_t halfplate_sweep(const halfplate::Problem *, double *, int64_t);
int32_t halfplate_gram_sweep(const halfplate::GramSweep *);
int32_t halfplate_rows(const halfplate::Rows *);
int32_t halfplate_affine_rows(const halfplate::AffineRows *);
const char *halfplate_isa();
}

using halfplate::Packed;
using halfplate::Stored;
using Bytes = std::vector<uint8_t>;

namespace {

std::mt19937 generator(1);
int random_below(int n) { return int(generator() % uint32_t(n)); }
float random_float() { return float(std::normal_distribution<double>()(generator)); }

uint16_t to_bf16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return uint16_t(bits >> 16);
}
float from_bf16(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
float from_half(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float magnitude = exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return h & 0x8000 ? -magnitude : magnitude;
}
// A half whose exponent is moderate, so that sums stay in range.
uint16_t random_half() { return uint16_t(random_below(2) << 15 | (8 + random_below(8)) << 10 | random_below(1024)); }

// Bits of a code of a kind from INT4 on.
int64_t code_bits(int32_t kind) { return kind == halfplate::FIVE ? 5 : 4; }
int64_t width(int32_t kind) { return kind == halfplate::FP32 ? 4 : kind == halfplate::INT8 ? 1 : 2; }

void random_value(int32_t kind, uint8_t *to) {
    if (kind == halfplate::FP32) {
        const float v = random_float();
        std::memcpy(to, &v, 4);
    } else if (kind == halfplate::BF16) {
        const uint16_t v = to_bf16(random_float());
        std::memcpy(to, &v, 2);
    } else if (kind == halfplate::FP16) {
        const uint16_t v = random_half();
        std::memcpy(to, &v, 2);
    } else *to = uint8_t(1 + random_below(255));
}

double value_of(int32_t kind, const uint8_t *p) {
    uint16_t h;
    float f;
    switch (kind) {
        case halfplate::FP32: std::memcpy(&f, p, 4); return f;
        case halfplate::BF16: std::memcpy(&h, p, 2); return from_bf16(h);
        case halfplate::FP16: std::memcpy(&h, p, 2); return from_half(h);
        default: return double(*p) - 128;
    }
}

struct Linear {
    Packed head{};
    Bytes weight, index, scales, out_blocks, out_tail, out_scales, in_blocks, in_tail, in_scales, blob;
    std::vector<float> bias;
    Stored stored{};

    void point() {
        auto data = [](Bytes &b) { return b.empty() ? nullptr : static_cast<void *>(b.data()); };
        stored = {data(weight),  data(index),     data(scales),  data(out_blocks), data(out_tail),
                  data(out_scales), data(in_blocks), data(in_tail), data(in_scales),  bias.empty() ? nullptr : bias.data(), {}};
        const Bytes *parts[] = {&weight, &index, &scales, &out_blocks, &out_tail, &out_scales, &in_blocks, &in_tail, &in_scales};
        for (int i = 0; i < 9; ++i) stored.bytes[i] = int64_t(parts[i]->size());
        stored.bytes[9] = int64_t(4 * bias.size());
    }
    Packed &packed() { return *reinterpret_cast<Packed *>(blob.data() + (64 - reinterpret_cast<uintptr_t>(blob.data()) % 64) % 64); }
};

void random_wrapper(int32_t kind, int64_t size, int64_t block, Bytes &blocks, Bytes &tail, Bytes &scales) {
    if (!block) return;
    const int64_t rest = size % block;
    blocks.resize(size_t(size / block * block * block * width(kind)));
    tail.resize(size_t(rest * rest * width(kind)));
    for (Bytes *part : {&blocks, &tail})
        for (size_t i = 0; i < part->size(); i += size_t(width(kind))) {
            random_value(kind, part->data() + i);
            if (kind == halfplate::INT8) (*part)[i] ^= 0x80;  // two's complement here
        }
    if (kind == halfplate::INT8) {
        scales.resize(size_t(2 * size));
        for (int64_t i = 0; i < size; ++i) {
            const uint16_t h = uint16_t(random_half() & 0x7fff);
            std::memcpy(scales.data() + 2 * i, &h, 2);
        }
    }
}

// Bytes of a stored row of the core.
int64_t weight_row(const Packed &p) {
    const int64_t kept = p.sparse ? p.d_in / 2 : p.d_in;
    return p.kind >= halfplate::INT4 ? (kept * code_bits(p.kind) + 7) / 8 : kept * width(p.kind);
}

void random_kind(Packed &p) {
    p.kind = random_below(p.sparse ? 6 : 7);
    p.group = p.kind >= halfplate::INT8 ? 32 << random_below(3) : halfplate::TILE;
    const int numbers = p.kind == halfplate::TABLE ? 16 : p.kind == halfplate::FIVE ? 32 : 0;
    for (int code = 0; code < numbers; ++code) p.table[code] = int8_t(random_below(255) - 127);
}

void random_linear(Linear &m, bool random_bytes) {
    Packed &p = m.head;
    const int64_t kept = p.sparse ? p.d_in / 2 : p.d_in;
    const int64_t row = weight_row(p);
    m.weight.resize(size_t(p.d_out * row));
    for (int64_t r = 0; r < p.d_out; ++r) {
        uint8_t *to = m.weight.data() + r * row;
        if (p.kind >= halfplate::INT4) {
            for (int64_t i = 0; i < row; ++i) to[i] = uint8_t(random_below(256));
            if (const int64_t used = kept * code_bits(p.kind) % 8) to[row - 1] &= uint8_t((1 << used) - 1);
        } else
            for (int64_t i = 0; i < kept; ++i) random_value(p.kind, to + i * width(p.kind));
    }
    if (p.sparse) {
        static const uint8_t pairs[6] = {4, 8, 12, 9, 13, 14};
        const int64_t groups = p.d_in / 4, bytes = (groups + 1) / 2;
        m.index.assign(size_t(p.d_out * bytes), 0);
        for (int64_t r = 0; r < p.d_out; ++r)
            for (int64_t g = 0; g < groups; ++g) m.index[size_t(r * bytes + g / 2)] |= uint8_t(pairs[random_below(6)] << 4 * (g & 1));
    }
    if (p.kind >= halfplate::INT8) {
        m.scales.resize(size_t(2 * p.d_out * halfplate::stored_scales(p)));
        for (size_t i = 0; i < m.scales.size(); i += 2) {
            const uint16_t h = uint16_t(random_half() & 0x7fff);
            std::memcpy(m.scales.data() + i, &h, 2);
        }
    }
    random_wrapper(p.wrapper_kind, p.d_out, p.out_block, m.out_blocks, m.out_tail, m.out_scales);
    random_wrapper(p.wrapper_kind, p.d_in, p.in_block, m.in_blocks, m.in_tail, m.in_scales);
    if (random_bytes)
        for (Bytes *part : {&m.weight, &m.index, &m.scales, &m.out_blocks, &m.out_tail, &m.out_scales, &m.in_blocks, &m.in_tail, &m.in_scales})
            for (uint8_t &b : *part) b = uint8_t(random_below(256));
    m.point();
    if (halfplate_place(&p, !m.bias.empty())) std::abort();
    m.blob.assign(size_t(p.nbytes + 64), 0xee);
    m.packed() = p;
}

using Matrix = std::vector<double>;

Matrix wrapper_matrix(int32_t kind, int64_t size, int64_t block, const Bytes &blocks, const Bytes &tail, const Bytes &scales) {
    Matrix m(size_t(size * size));
    for (int64_t i = 0; i < size; ++i) {
        if (!block) {
            m[size_t(i * size + i)] = 1;
            continue;
        }
        const int64_t first = i / block * block, wide = size - first < block ? size - first : block;
        const bool in_tail = wide < block;
        for (int64_t j = 0; j < wide; ++j) {
            const int64_t at = in_tail ? (i - first) * wide + j : first * block + (i - first) * block + j;
            const uint8_t *p = (in_tail ? tail : blocks).data() + at * width(kind);
            double v = kind == halfplate::INT8 ? double(int8_t(*p)) : value_of(kind, p);
            uint16_t h;
            if (kind == halfplate::INT8) std::memcpy(&h, scales.data() + 2 * i, 2), v *= from_half(h);
            m[size_t(i * size + first + j)] = v;
        }
    }
    return m;
}

Matrix core_matrix(const Linear &m) {
    const Packed &p = m.head;
    const int64_t kept = p.sparse ? p.d_in / 2 : p.d_in;
    const int64_t row = weight_row(p), index_row = (p.d_in / 4 + 1) / 2, wide = code_bits(p.kind);
    Matrix dense(size_t(p.d_out * p.d_in));
    for (int64_t r = 0; r < p.d_out; ++r)
        for (int64_t i = 0; i < kept; ++i) {
            const uint8_t *w = m.weight.data() + r * row;
            int code = -(1 << (wide - 1));  // of a stream of bits, with an offset
            for (int64_t b = 0; p.kind >= halfplate::INT4 && b < wide; ++b) code += (w[(i * wide + b) / 8] >> (i * wide + b) % 8 & 1) << b;
            double v = p.kind == halfplate::INT4    ? double(code)
                       : p.kind >= halfplate::TABLE ? double(p.table[code & ((1 << wide) - 1)])
                                                    : value_of(p.kind, w + i * width(p.kind));
            const int64_t group = i / 2;
            const int64_t c = p.sparse ? 4 * group + (m.index[size_t(r * index_row + group / 2)] >> (4 * (group & 1) + 2 * (i & 1)) & 3) : i;
            if (!m.scales.empty()) {
                uint16_t h;
                std::memcpy(&h, m.scales.data() + 2 * (r * halfplate::stored_scales(p) + c / p.group), 2);
                v *= from_half(h);
            }
            dense[size_t(r * p.d_in + c)] = v;
        }
    return dense;
}

// z = M x and the same of magnitudes, which bounds the error of rounding.
void product(const Matrix &m, int64_t rows, int64_t columns, const Matrix &x, const Matrix &bound, Matrix &y, Matrix &y_bound) {
    y.assign(size_t(rows), 0);
    y_bound.assign(size_t(rows), 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            y[size_t(r)] += m[size_t(r * columns + c)] * x[size_t(c)];
            y_bound[size_t(r)] += std::fabs(m[size_t(r * columns + c)]) * bound[size_t(c)];
        }
}

[[noreturn]] void fail(const Packed &p, const char *what, double error) {
    std::printf("%s: d_out %ld d_in %ld kind %d sparse %d activations %d wrappers %d blocks %ld %ld: %g\n", what, long(p.d_out),
                long(p.d_in), p.kind, p.sparse, p.activations, p.wrapper_kind, long(p.out_block), long(p.in_block), error);
    std::exit(1);
}

void check_round_trip(Linear &m) {
    Linear back;
    back.head = m.head;
    back.weight.resize(m.weight.size());
    back.index.resize(m.index.size());
    back.scales.resize(m.scales.size());
    back.out_blocks.resize(m.out_blocks.size());
    back.out_tail.resize(m.out_tail.size());
    back.out_scales.resize(m.out_scales.size());
    back.in_blocks.resize(m.in_blocks.size());
    back.in_tail.resize(m.in_tail.size());
    back.in_scales.resize(m.in_scales.size());
    back.bias.resize(m.bias.size());
    back.point();
    if (halfplate_unpack(&m.packed(), m.head.nbytes, &back.stored, 2)) fail(m.head, "not unpacked", 0);
    const bool same = back.weight == m.weight && back.index == m.index && back.scales == m.scales && back.out_blocks == m.out_blocks &&
                      back.out_tail == m.out_tail && back.out_scales == m.out_scales && back.in_blocks == m.in_blocks &&
                      back.in_tail == m.in_tail && back.in_scales == m.in_scales && back.bias == m.bias;
    if (!same) fail(m.head, "unpacked tensors differ", 0);
}

void check_product(Linear &m, int64_t tokens) {
    const Packed &p = m.head;
    const Matrix a = wrapper_matrix(p.wrapper_kind, p.d_out, p.out_block, m.out_blocks, m.out_tail, m.out_scales);
    const Matrix b = wrapper_matrix(p.wrapper_kind, p.d_in, p.in_block, m.in_blocks, m.in_tail, m.in_scales);
    const Matrix s = core_matrix(m);
    const int64_t ldx = p.d_in + 3;  // rows apart
    std::vector<float> x(size_t(tokens * ldx - 3)), y(size_t(tokens * p.d_out)), again(y.size());
    for (float &v : x) v = random_float();
    const int64_t x_bytes = int64_t(4 * x.size()), y_bytes = int64_t(4 * y.size());
    const int32_t status = halfplate_linear(&m.packed(), p.nbytes, x.data(), x_bytes, ldx, y.data(), y_bytes, tokens, 1);
    if (status) fail(p, "not multiplied", status);
    for (int64_t threads = 2; threads <= 5; threads += 3) {
        halfplate_linear(&m.packed(), p.nbytes, x.data(), x_bytes, ldx, again.data(), y_bytes, tokens, threads);
        if (std::memcmp(y.data(), again.data(), 4 * y.size())) fail(p, "threads change the result", double(threads));
    }
    for (int64_t k = 0; k < tokens; ++k) {
        Matrix in(size_t(p.d_in)), z, z_bound, r, r_bound, out, bound;
        for (int64_t i = 0; i < p.d_in; ++i) in[size_t(i)] = x[size_t(k * ldx + i)];
        Matrix magnitude = in;
        for (double &v : magnitude) v = std::fabs(v);
        product(b, p.d_in, p.d_in, in, magnitude, z, z_bound);
        double tolerance = 1e-6;
        if (p.activations == halfplate::BYTES || (p.activations == halfplate::MANY_BYTES && tokens >= (p.sparse ? 16 : 4))) {
            const int64_t span = p.activations == halfplate::BYTES ? 128 : p.group;
            // Half a step of the scale of its columns, and what rounding of the input can turn over.
            for (int64_t first = 0; first < p.d_in; first += span) {
                const int64_t end = p.d_in < first + span ? p.d_in : first + span;
                double largest = 0;
                for (int64_t i = first; i < end; ++i) largest = std::fmax(largest, std::fabs(z[size_t(i)]));
                for (int64_t i = first; i < end; ++i) z_bound[size_t(i)] = 1e-4 * z_bound[size_t(i)] + largest / 127 * 0.51;
            }
            tolerance = 1;
        }
        product(s, p.d_out, p.d_in, z, z_bound, r, r_bound);
        product(a, p.d_out, p.d_out, r, r_bound, out, bound);
        for (int64_t i = 0; i < p.d_out; ++i) {
            const double bias = m.bias.empty() ? 0 : m.bias[size_t(i)];
            const double error = std::fabs(out[size_t(i)] + bias - y[size_t(k * p.d_out + i)]);
            if (!(error <= tolerance * bound[size_t(i)] + 1e-6 * std::fabs(bias) + 1e-30)) fail(p, "product", error);
        }
    }
    if (p.activations == halfplate::BYTES) return;
    std::vector<float> dense(size_t(p.d_out * p.d_in));
    if (halfplate_expand(&m.packed(), p.nbytes, dense.data(), int64_t(4 * dense.size()), 0, 2)) fail(p, "not expanded", 0);
    for (size_t i = 0; i < dense.size(); ++i)
        if (!(std::fabs(double(dense[i]) - s[i]) <= 1e-6 * std::fabs(s[i]))) fail(p, "expanded core", dense[i] - s[i]);
}

// Every buffer one byte, one number or one element type off, on the heap, where a sanitizer sees the first byte too many.
void check_refusals(Linear &m, int64_t tokens) {
    const Packed &p = m.head, *packed = &m.packed();
    const int64_t size = p.nbytes, x_bytes = 4 * tokens * p.d_in, y_bytes = 4 * tokens * p.d_out;
    std::vector<float> x(size_t(tokens * p.d_in), 1), y(size_t(tokens * p.d_out), 7);
    auto expect = [&](int32_t status, const char *what) {
        if (status >= 0) fail(p, what, status);
    };
    for (int64_t off : {-4, -1, 1, 4}) {
        expect(halfplate_linear(packed, size + off, x.data(), x_bytes, p.d_in, y.data(), y_bytes, tokens, 1), "packed size");
        expect(halfplate_linear(packed, size, x.data(), x_bytes + off, p.d_in, y.data(), y_bytes, tokens, 1), "x size");
        expect(halfplate_linear(packed, size, x.data(), x_bytes, p.d_in, y.data(), y_bytes + off, tokens, 1), "y size");
        expect(halfplate_expand(packed, size, y.data(), 4 * p.d_out * p.d_in + off, 0, 1), "expanded size");
        for (int side = 0; side < 2; ++side) {
            const int64_t width = side ? p.d_out : p.d_in;
            expect(halfplate_wrap(packed, size, side, x.data(), 4 * tokens * width, width, y.data(), 4 * tokens * width + off, tokens, 1), "wrapped size");
        }
        for (int part = 0; part < 10; ++part) {
            Stored wrong = m.stored;
            wrong.bytes[part] += off;
            expect(halfplate_unpack(packed, size, &wrong, 1), "stored size");
            Bytes blob = m.blob;
            expect(halfplate_pack(reinterpret_cast<Packed *>(blob.data() + (reinterpret_cast<const uint8_t *>(packed) - m.blob.data())), size, &wrong, 1), "stored size to pack");
        }
    }
    for (int64_t wrong : {int64_t(0), int64_t(-1), int64_t(1) << 40, int64_t(1) << 62, INT64_MIN, INT64_MAX}) {
        expect(halfplate_linear(packed, size, x.data(), x_bytes, p.d_in, y.data(), y_bytes, wrong, 1), "tokens");
        if (tokens > 1) expect(halfplate_linear(packed, size, x.data(), x_bytes, wrong, y.data(), y_bytes, tokens, 1), "stride");
        if (wrong <= 0) expect(halfplate_linear(packed, size, x.data(), x_bytes, p.d_in, y.data(), y_bytes, tokens, wrong), "threads");
    }
    expect(halfplate_linear(packed, size, nullptr, x_bytes, p.d_in, y.data(), y_bytes, tokens, 1), "no x");
    expect(halfplate_linear(nullptr, size, x.data(), x_bytes, p.d_in, y.data(), y_bytes, tokens, 1), "no matrix");
    for (float v : y)
        if (v != 7) fail(p, "written before it was refused", v);
    // A damaged header is refused, or describes a matrix of the same size and stays in bounds.
    Bytes blob(size_t(size) + 64);
    auto *copy = reinterpret_cast<Packed *>(blob.data() + (64 - reinterpret_cast<uintptr_t>(blob.data()) % 64) % 64);
    for (int i = 0; i < 8; ++i) {
        std::memcpy(copy, packed, size_t(size));
        reinterpret_cast<uint8_t *>(copy)[random_below(int(sizeof(Packed)))] ^= uint8_t(1 + random_below(255));
        halfplate_linear(copy, size, x.data(), x_bytes, p.d_in, y.data(), y_bytes, tokens, 1 + random_below(3));
    }
}

// Members with different numbers of rows, side by side and below each other, against single calls; and members that do not fit.
void check_group(Linear &m, int64_t first, int64_t second) {
    const Packed &p = m.head, *packed = &m.packed();
    const int64_t rows = first + second, width = 2 * p.d_out, ldx = p.d_in + 3;
    std::vector<float> x(size_t(rows * ldx - 3)), y(size_t(rows * width), 7), one(size_t(rows * p.d_out));
    for (float &v : x) v = random_float();
    const int64_t x_bytes = int64_t(4 * x.size()), y_bytes = int64_t(4 * y.size());
    const halfplate::Member members[3] = {{packed, p.nbytes, 0, 0, first, 0, p.d_out},
                                          {packed, p.nbytes, first, first, second, p.d_out, p.d_out},
                                          {packed, p.nbytes, 0, 0, second < first ? second : first, p.d_out, p.d_out}};
    auto group = [&](const halfplate::Member *all, int64_t count, int64_t off, int64_t threads) {
        return halfplate_group(all, count * int64_t(sizeof *all), count, x.data(), x_bytes, rows, p.d_in, ldx, y.data(), y_bytes + off, rows, width, threads);
    };
    for (int64_t threads = 1; threads <= 4; threads += 3) {
        std::fill(y.begin(), y.end(), 7.0f);
        if (const int32_t status = group(members, 3, 0, threads)) fail(p, "no group", status);
        for (const halfplate::Member &own : members) {
            const float *from = x.data() + own.from * ldx;
            halfplate_linear(packed, p.nbytes, from, 4 * ((own.tokens - 1) * ldx + p.d_in), ldx, one.data(), 4 * own.tokens * p.d_out, own.tokens, 1);
            for (int64_t k = 0; k < own.tokens; ++k)
                if (std::memcmp(&y[size_t((own.to + k) * width + own.column)], &one[size_t(k * p.d_out)], size_t(4 * p.d_out))) fail(p, "group", double(k));
        }
        for (int64_t k = first; k < rows; ++k)
            if (y[size_t(k * width)] != 7) fail(p, "group wrote beyond its members", double(k));
    }
    for (int64_t halfplate::Member::*field : {&halfplate::Member::bytes, &halfplate::Member::from, &halfplate::Member::to, &halfplate::Member::tokens,
                                              &halfplate::Member::column, &halfplate::Member::d_out})
        for (int64_t wrong : {int64_t(-1), rows + 1, width + 1, int64_t(1) << 62, INT64_MIN, INT64_MAX}) {
            halfplate::Member bad = members[1];
            bad.*field = wrong;
            // Another number may fit by chance.
            if (bad.from + 0.0 + bad.tokens <= rows && bad.to + 0.0 + bad.tokens <= rows && bad.column + 0.0 + p.d_out <= width && bad.d_out == p.d_out &&
                bad.bytes == p.nbytes && bad.from >= 0 && bad.to >= 0 && bad.column >= 0 && bad.tokens > 0) continue;
            if (group(&bad, 1, 0, 2) >= 0) fail(p, "member not refused", double(wrong));
        }
    for (int64_t off : {-4, 4})
        if (group(members, 3, off, 1) >= 0) fail(p, "output of a group not refused", double(off));
    for (int64_t count : {int64_t(0), int64_t(-1), INT64_MIN, INT64_MAX})
        if (halfplate_group(members, sizeof members, count, x.data(), x_bytes, rows, p.d_in, ldx, y.data(), y_bytes, rows, width, 1) >= 0) fail(p, "count of a group", double(count));
}

Linear &dense_linear(std::vector<Linear> &all, int64_t d_out, int64_t d_in) {
    all.emplace_back();
    Linear &m = all.back();
    m.head.d_out = d_out;
    m.head.d_in = d_in;
    random_kind(m.head);
    random_linear(m, false);
    if (halfplate_pack(&m.packed(), m.head.nbytes, &m.stored, 1)) fail(m.head, "refused", 0);
    return m;
}

#include "decoder_cases.inc"

// Draws from one logit, from several blocks, and from logits that are not finite.
void check_draw() {
    for (int64_t count : {1, 5, 511, 600, 40000}) {
        std::vector<float> logits(size_t(2 * count), -1.0f);
        const double chances[2] = {0.0, 0.999999999};
        int64_t tokens[2] = {-7, -7};
        auto draw = [&] { return halfplate_draw(logits.data(), 8 * count, 2, count, 1.0f, chances, 16, tokens, 16, 2); };
        if (draw() || tokens[0] != 0 || tokens[1] < 0 || tokens[1] >= count) fail(Packed{}, "a draw", double(count));
        logits[0] = __builtin_nanf("");
        if (draw() || tokens[0] != -1 || tokens[1] < 0) fail(Packed{}, "a draw from NaN", double(count));
    }
}

// The solver's sweeps on small problems, and with each buffer one number short.
void check_solver() {
    const int64_t patterns[][2] = {{2, 4}, {1, 1}, {3, 8}, {16, 32}, {1, 256}};
    for (const auto &pattern : patterns) {
        const int64_t row_tile = 1 + random_below(9), row_tiles = 1 + random_below(3), col_tiles = 1 + random_below(3);
        const int64_t col_tile = pattern[1] * (1 + random_below(2)), rows = row_tile * row_tiles, cols = col_tile * col_tiles;
        auto floats = [](int64_t count) {
            std::vector<float> v(static_cast<size_t>(count));
            for (float &x : v) x = random_float();
            return v;
        };
        std::vector<float> weight = floats(rows * cols), out = floats(rows * row_tile), in = floats(cols * col_tile), moment(size_t(cols), 1.0f);
        std::vector<float> core = floats(rows * cols), error = floats(rows * cols), product = floats(rows * cols), gram(size_t(cols * cols));
        std::vector<float> steps(size_t(rows * halfplate::ceil_div(cols, 2 * pattern[1])), 0.1f);
        for (int64_t i = 0; i < cols; ++i) gram[size_t(i * cols + i)] = 1;
        std::vector<float> table(16);
        for (int k = 0; k < 16; ++k) table[size_t(k)] = float(k * k - 40) / 64;
        std::vector<double> losses(size_t(row_tiles * col_tiles));
        auto bytes = [](const auto &v) { return int64_t(v.size() * sizeof v[0]); };
        // A core of more values than the pattern keeps is wrong, but nothing is written outside of it.
        halfplate::Problem p{weight.data(), out.data(), in.data(), moment.data(), core.data(), row_tiles, row_tile, col_tiles, col_tile,
                             pattern[0], pattern[1], 2, {bytes(weight), bytes(out), bytes(in), bytes(moment), bytes(core)}};
        halfplate::GramSweep g{core.data(), error.data(), product.data(), out.data(), gram.data(), table.data(), steps.data(), row_tiles, row_tile, cols,
                               pattern[0], pattern[1], -8, 7, 2 * pattern[1], 1, 2,
                               {bytes(core), bytes(error), bytes(product), bytes(out), bytes(gram), bytes(table), bytes(steps)}};
        auto expect = [&](bool right, const char *what) {
            if (right) return;
            std::printf("solver %ld:%ld: %s\n", long(pattern[0]), long(pattern[1]), what);
            std::exit(1);
        };
        expect(halfplate_sweep(&p, losses.data(), bytes(losses)) == 0, "sweep refused");
        expect(halfplate_gram_sweep(&g) == 0, "sweep over the Gram refused");
        g.table = nullptr, g.bytes[5] = 0;
        expect(halfplate_gram_sweep(&g) == 0, "sweep over the Gram without a table refused");
        g.table = table.data(), g.bytes[5] = bytes(table);
        g.greatest = 8;
        expect(halfplate_gram_sweep(&g) < 0, "a table there is no room for");
        g.greatest = 7;
        expect(halfplate_sweep(&p, losses.data(), bytes(losses) / 2) < 0, "losses in floats");
        for (int64_t &size : p.bytes) {
            size -= 4;
            expect(halfplate_sweep(&p, losses.data(), bytes(losses)) < 0, "a short buffer");
            size += 4;
        }
        for (int64_t &size : g.bytes) {
            size += 4;
            expect(halfplate_gram_sweep(&g) < 0, "a long buffer");
            size -= 4;
        }
        p.kept = 17, p.group = 64;
        expect(halfplate_sweep(&p, losses.data(), bytes(losses)) < 0, "a pattern there is no room for");
        g.cols = -4;
        expect(halfplate_gram_sweep(&g) < 0, "a size below 0");
        std::vector<int64_t> order(cols);
        for (int64_t k = 0; k < cols; ++k) order[k] = cols - 1 - k;
        std::vector<double> points(3 + 2);
        halfplate::Rows r{weight.data(), gram.data(), gram.data(), order.data(), table.data(), steps.data(), core.data(), points.data(), rows, cols,
                          -8, 7, 2 * pattern[1], 3, 2, 2,
                          {bytes(weight), bytes(gram), bytes(gram), bytes(order), bytes(table), bytes(steps), bytes(core), bytes(points)}};
        expect(halfplate_rows(&r) == 0, "rows refused");
        r.table = nullptr, r.bytes[4] = 0;
        expect(halfplate_rows(&r) == 0, "rows without a table refused");
        for (int64_t &size : r.bytes) {
            size += 4;
            expect(halfplate_rows(&r) < 0, "a long buffer");
            size -= 4;
        }
        std::vector<float> minima(steps.size(), -0.2f), units(steps.size(), 0.015625f), free_steps(steps.size()), free_minima(steps.size());
        std::vector<double> of_rows(size_t(rows * 3));
        r.rounds = 1, r.losses = of_rows.data(), r.bytes[7] = bytes(of_rows);
        halfplate::AffineRows a{r, minima.data(), units.data(), units.data(), free_steps.data(), free_minima.data(), 63,
                                {bytes(minima), bytes(units), bytes(units), bytes(units), bytes(units)}};
        expect(halfplate_affine_rows(&a) == 0, "rows with minima refused");
        for (int64_t &size : a.bytes) {
            size += 4;
            expect(halfplate_affine_rows(&a) < 0, "a long buffer of minima");
            size -= 4;
        }
        for (int64_t most : {int64_t(-1), int64_t(0), int64_t(1) << 40}) {
            a.most = most;
            expect(halfplate_affine_rows(&a) < 0, "multiples there are none of");
        }
        a.step_units = a.minimum_units = nullptr, a.bytes[1] = a.bytes[2] = a.most = 0;
        expect(halfplate_affine_rows(&a) == 0, "rows with minima in halves refused");
        a.minima = a.free_minima = nullptr, a.bytes[0] = a.bytes[4] = 0;
        expect(halfplate_affine_rows(&a) == 0, "rows without minima refused");
        a.rows.rounds = 2;
        expect(halfplate_affine_rows(&a) < 0, "two descents");
        order[0] = cols;
        expect(halfplate_rows(&r) < 0, "a column outside");
    }
}

}  // namespace

int main(int count, char **arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 2000;
    static const int64_t blocks[] = {0, 0, 1, 4, 8, 12, 16, 24, 32, 128, 400};
    for (int i = 0; i < cases; ++i) {
        Linear m;
        Packed &p = m.head;
        p.sparse = random_below(3) > 0;
        p.d_out = 1 + random_below(i % 7 ? 40 : 300);
        p.d_in = p.sparse ? 4 * (1 + random_below(80)) : 1 + random_below(300);
        random_kind(p);
        p.wrapper_kind = random_below(4);
        p.activations = p.kind >= halfplate::INT8 ? random_below(3) : halfplate::FLOAT;
        if (p.kind == halfplate::FIVE && p.activations == halfplate::BYTES) p.activations = halfplate::MANY_BYTES;
        p.out_block = blocks[random_below(11)];
        p.in_block = blocks[random_below(11)];
        if (random_below(2)) {
            m.bias.resize(size_t(p.d_out));
            for (float &v : m.bias) v = random_float();
        }
        const bool random_bytes = i % 10 == 9;
        random_linear(m, random_bytes);
        const int32_t refused = halfplate_pack(&m.packed(), p.nbytes, &m.stored, 1 + random_below(3));
        if (random_bytes) {
            // Whatever a file holds, packing and multiplying stay in bounds; the sanitizers watch.
            std::vector<float> x(size_t(2 * p.d_in), 1), y(size_t(2 * p.d_out));
            halfplate_linear(&m.packed(), p.nbytes, x.data(), int64_t(4 * x.size()), p.d_in, y.data(), int64_t(4 * y.size()), 2, 2);
            continue;
        }
        if (refused) fail(p, "refused", refused);
        check_round_trip(m);
        check_product(m, p.activations == halfplate::MANY_BYTES && random_below(2) ? 2 + random_below(40) : 1 + random_below(7));
        check_refusals(m, 1 + random_below(3));
        check_group(m, 1 + random_below(18), 1 + random_below(5));
    }
    check_decoders();
    check_draw();
    check_solver();
    std::printf("%d cases on %s\n", cases, halfplate_isa());
    return 0;
}
