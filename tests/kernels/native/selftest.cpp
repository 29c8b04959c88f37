// The kernels against a naive reference, without Python: for sanitizers and for processors that only an emulator has
// (run.sh). Prints the number of cases and ends with 1 at the first one that is wrong.

#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "layout.h"
#include "pack.h"
#include "runtime.h"

extern "C" {
void halfplate_place(halfplate::Packed *, int32_t);
int32_t halfplate_pack(halfplate::Packed *, const halfplate::Stored *, int64_t);
void halfplate_unpack(const halfplate::Packed *, const halfplate::Stored *, int64_t);
int32_t halfplate_linear(const halfplate::Packed *, const float *, int64_t, float *, int64_t, int64_t, int64_t);
void halfplate_expand(const halfplate::Packed *, void *, int32_t, int64_t);
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
                  data(out_scales), data(in_blocks), data(in_tail), data(in_scales),  bias.empty() ? nullptr : bias.data()};
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

void random_linear(Linear &m, bool random_bytes) {
    Packed &p = m.head;
    const int64_t kept = p.sparse ? p.d_in / 2 : p.d_in;
    const int64_t row = p.kind == halfplate::INT4 ? (kept + 1) / 2 : kept * width(p.kind);
    m.weight.resize(size_t(p.d_out * row));
    for (int64_t r = 0; r < p.d_out; ++r) {
        uint8_t *to = m.weight.data() + r * row;
        if (p.kind == halfplate::INT4) {
            for (int64_t i = 0; i < row; ++i) to[i] = uint8_t(random_below(256));
            if (kept % 2) to[row - 1] &= 15;
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
    if (p.kind == halfplate::INT8 || p.kind == halfplate::INT4) {
        m.scales.resize(size_t(2 * p.d_out * halfplate::tiles(p)));
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
    halfplate_place(&p, !m.bias.empty());
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
    const int64_t row = p.kind == halfplate::INT4 ? (kept + 1) / 2 : kept * width(p.kind), index_row = (p.d_in / 4 + 1) / 2;
    Matrix dense(size_t(p.d_out * p.d_in));
    for (int64_t r = 0; r < p.d_out; ++r)
        for (int64_t i = 0; i < kept; ++i) {
            const uint8_t *w = m.weight.data() + r * row;
            double v = p.kind == halfplate::INT4 ? double(w[i / 2] >> 4 * (i & 1) & 15) - 8 : value_of(p.kind, w + i * width(p.kind));
            const int64_t group = i / 2;
            const int64_t c = p.sparse ? 4 * group + (m.index[size_t(r * index_row + group / 2)] >> (4 * (group & 1) + 2 * (i & 1)) & 3) : i;
            if (!m.scales.empty()) {
                uint16_t h;
                std::memcpy(&h, m.scales.data() + 2 * (r * halfplate::tiles(p) + c / 128), 2);
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
    halfplate_unpack(&m.packed(), &back.stored, 2);
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
    if (halfplate_linear(&m.packed(), x.data(), ldx, y.data(), p.d_out, tokens, 1)) fail(p, "no memory", 0);
    for (int64_t threads = 2; threads <= 5; threads += 3) {
        halfplate_linear(&m.packed(), x.data(), ldx, again.data(), p.d_out, tokens, threads);
        if (std::memcmp(y.data(), again.data(), 4 * y.size())) fail(p, "threads change the result", double(threads));
    }
    for (int64_t k = 0; k < tokens; ++k) {
        Matrix in(size_t(p.d_in)), z, z_bound, r, r_bound, out, bound;
        for (int64_t i = 0; i < p.d_in; ++i) in[size_t(i)] = x[size_t(k * ldx + i)];
        Matrix magnitude = in;
        for (double &v : magnitude) v = std::fabs(v);
        product(b, p.d_in, p.d_in, in, magnitude, z, z_bound);
        double tolerance = 1e-6;
        if (p.activations == halfplate::BYTES) {
            // Half a step of the scale of its 128 columns, and what rounding of the input can turn over.
            for (int64_t first = 0; first < p.d_in; first += 128) {
                const int64_t end = p.d_in < first + 128 ? p.d_in : first + 128;
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
    halfplate_expand(&m.packed(), dense.data(), 0, 2);
    for (size_t i = 0; i < dense.size(); ++i)
        if (!(std::fabs(double(dense[i]) - s[i]) <= 1e-6 * std::fabs(s[i]))) fail(p, "expanded core", dense[i] - s[i]);
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
        p.kind = random_below(5);
        p.wrapper_kind = random_below(4);
        p.activations = p.kind >= halfplate::INT8 ? random_below(2) : 0;
        p.out_block = blocks[random_below(11)];
        p.in_block = blocks[random_below(11)];
        if (random_below(2)) {
            m.bias.resize(size_t(p.d_out));
            for (float &v : m.bias) v = random_float();
        }
        const bool random_bytes = i % 10 == 9;
        random_linear(m, random_bytes);
        const int32_t refused = halfplate_pack(&m.packed(), &m.stored, 1 + random_below(3));
        if (random_bytes) {
            // Whatever a file holds, packing and multiplying stay in bounds; the sanitizers watch.
            std::vector<float> x(size_t(2 * p.d_in), 1), y(size_t(2 * p.d_out));
            halfplate_linear(&m.packed(), x.data(), p.d_in, y.data(), p.d_out, 2, 2);
            continue;
        }
        if (refused) fail(p, "refused", refused);
        check_round_trip(m);
        check_product(m, 1 + random_below(7));
    }
    std::printf("%d cases on %s\n", cases, halfplate_isa());
    return 0;
}
