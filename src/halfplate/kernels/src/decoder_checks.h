// Checks of a decoder and of a step, before anything is read or written.
#pragma once

#include "checks.h"

namespace halfplate {

constexpr int64_t LARGEST_SEQUENCES = 4096, LARGEST_ROWS = 1 << 16, LARGEST_MIXTURE = 4096;

// A matrix in a decoder: in detail before the first step, and of every step only its header.
struct Fits {
    bool whole;
    bool operator()(const Packed *p, int64_t bytes, int64_t d_in, int64_t d_out) const {
        return (whole ? sound(p, bytes) : intact(p, bytes)) && p->d_in == d_in && p->d_out == d_out;
    }
};

static inline bool fits_expert(const Decoder &d, const Expert &e, int64_t intermediate, Fits fits) {
    const bool split = d.gated && e.up;
    if (!d.gated && e.up) return false;
    return fits(e.gate, e.bytes[0], d.hidden, d.gated && !split ? 2 * intermediate : intermediate) &&
           (!split || fits(e.up, e.bytes[1], d.hidden, intermediate)) && fits(e.down, e.bytes[2], intermediate, d.hidden);
}

// The experts themselves are only checked before the first step, because a step reads few of them.
static inline bool fits_mlp(const Decoder &d, const DecoderBlock &b, Fits fits) {
    const Mixture &m = b.mixture;
    if (m.experts == 0) return fits_expert(d, b.mlp, b.intermediate, fits);
    if (!fits(m.router, m.router_bytes, d.hidden, m.experts)) return false;
    if (!fits.whole) return true;
    if (!holds(m.expert, m.expert_bytes, m.experts * int64_t(sizeof(Expert))) || !holds(m.correction, m.correction_bytes, m.correction ? 4 * m.experts : 0))
        return false;
    for (int64_t e = 0; e < m.experts; ++e)
        if (!fits_expert(d, m.expert[e], b.intermediate, fits)) return false;
    if (m.shared_intermediate == 0) return !m.shared_gate;
    return fits_expert(d, m.shared, m.shared_intermediate, fits) && (!m.shared_gate || fits(m.shared_gate, m.shared_gate_bytes, d.hidden, 1));
}

static inline bool fits_attention(const Decoder &d, const DecoderBlock &b, Fits fits) {
    const int64_t queries = d.heads * d.head_dim, keys = d.kv_heads * d.head_dim, *bytes = b.linear_bytes;
    if (!fits(b.o, bytes[3], queries, d.hidden)) return false;
    if (!b.k && !b.v) return fits(b.q, bytes[0], d.hidden, queries + 2 * keys);
    return fits(b.q, bytes[0], d.hidden, queries) && fits(b.k, bytes[1], d.hidden, keys) && fits(b.v, bytes[2], d.hidden, keys);
}

// Numbers of a decoder that select what it does.
static inline bool sensible_traits(const Decoder &d) {
    for (int64_t flag : {d.rotary_pairs, d.gated, d.parallel, d.whole_norms, d.late_norms})
        if (!within(flag, 0, 1)) return false;
    return within(d.norm, RMS, MEAN) && within(d.activation, SILU, d.gated ? CLAMPED : RELU2) && within(d.tables, 0, 2) && within(d.rotary_dim, 2, d.head_dim) &&
           d.rotary_dim % 2 == 0 && d.attention_cap >= 0 && d.logit_cap >= 0 && !(d.whole_norms && (d.late_norms || d.norm != RMS));
}

// Whether each token finds as many experts as it chooses.
static inline bool sensible_routing(const Mixture &m) {
    if (!within(m.experts, 0, LARGEST_MIXTURE) || !within(m.shared_intermediate, 0, LARGEST_SIDE)) return false;
    if (m.experts == 0) return m.chosen == 0;
    return within(m.normalised, 0, 1) && within(m.logistic, 0, 1) && within(m.groups, 1, m.experts < LARGEST_GROUPS ? m.experts : LARGEST_GROUPS) &&
           m.experts % m.groups == 0 && within(m.chosen_groups, 1, m.groups) && within(m.chosen, 1, m.chosen_groups * (m.experts / m.groups)) &&
           m.least_sum >= 0;
}

static inline int32_t check_block(const Decoder &d, const DecoderBlock &b) {
    const Mixture &m = b.mixture;
    const int64_t numbers = d.norm == MEAN ? 8 : 4;  // bytes
    if (!within(b.intermediate, 1, LARGEST_SIDE) || !within(b.window, 0, LARGEST_SIDE) || !within(b.rotary, -1, d.tables - 1) ||
        !sensible_routing(m))
        return BAD_NUMBER;
    if (d.parallel && (!b.norms[0] || b.norms[1] || b.norms[2])) return BAD_NUMBER;
    for (int i = 0; i < 4; ++i)
        if (!holds(b.norms[i], b.norm_bytes[i], b.norms[i] ? numbers * d.hidden : 0)) return BAD_SIZE;
    const int64_t queries = numbers * d.head_dim * (d.whole_norms ? d.heads : 1), keys = numbers * d.head_dim * (d.whole_norms ? d.kv_heads : 1);
    if (!b.query_norm != !b.key_norm || !holds(b.query_norm, b.norm_bytes[4], b.query_norm ? queries : 0) ||
        !holds(b.key_norm, b.norm_bytes[5], b.key_norm ? keys : 0))
        return BAD_SIZE;
    return holds(b.sinks, b.sink_bytes, b.sinks ? 4 * d.heads : 0) ? DONE : BAD_SIZE;
}

// Whether the sizes and matrices of a decoder match. whole: also check everything in detail, before the first step.
static inline int32_t check_decoder(const Decoder &d, bool whole) {
    if (whole) {
        for (int64_t size : {d.hidden, d.heads, d.kv_heads, d.head_dim, d.vocabulary, d.blocks, d.capacity})
            if (!within(size, 1, LARGEST_SIDE)) return BAD_NUMBER;
        if (!within(d.sequences, 1, LARGEST_SEQUENCES) || !within(d.rows, d.sequences, LARGEST_ROWS) || !sensible_traits(d)) return BAD_NUMBER;
        if (d.heads % d.kv_heads || !within(d.heads * d.head_dim, 1, LARGEST_SIDE)) return BAD_NUMBER;
        if (!holds(d.block, d.block_bytes, d.blocks * int64_t(sizeof(DecoderBlock)))) return BAD_SIZE;
        if (!holds(d.final_norm, d.final_norm_bytes, (d.norm == MEAN ? 8 : 4) * d.hidden)) return BAD_SIZE;
    }
    const Fits fits{whole};
    if (!fits(d.head, d.head_bytes, d.hidden, d.vocabulary)) return BAD_HEADER;
    for (int64_t i = 0; i < d.blocks; ++i) {
        if (whole)
            if (const int32_t bad = check_block(d, d.block[i])) return bad;
        if (!fits_attention(d, d.block[i], fits) || !fits_mlp(d, d.block[i], fits)) return BAD_HEADER;
    }
    return DONE;
}

// Whether the cache, the tables and the scratch are those that a step of a team of `threads` at position `slot` needs.
static inline int32_t check_state(const Decoder &d, int64_t slot, int64_t sequences, int64_t threads) {
    const int64_t table = 4 * d.capacity * d.rotary_dim, vectors = sequences * d.kv_heads * d.capacity;
    const int64_t cached = vectors * d.head_dim * (d.cache_kind == INT8 ? 1 : d.cache_kind == BF16 ? 2 : 4), scales = d.cache_kind == INT8 ? 4 * vectors : 0;
    if (!within(slot, 0, d.capacity - 1) || !within(d.tables, 0, 2) || d.sized_threads != threads || d.sized_capacity != d.capacity ||
        d.sequences != sequences || d.rows != d.sized_rows || (d.cache_kind != FP32 && ((d.cache_kind != BF16 && d.cache_kind != INT8) || d.head_dim % 16)) || d.sized_sequences != sequences)
        return BAD_NUMBER;
    for (int64_t t = 0; t < d.tables; ++t)
        if (!holds(d.cosines[t], d.table_bytes[t], table) || !holds(d.sines[t], d.table_bytes[2 + t], table)) return BAD_SIZE;
    if (d.scratch == nullptr || reinterpret_cast<uintptr_t>(d.scratch) % 64 || d.scratch_bytes < 4 * d.sized_floats) return BAD_SIZE;
    for (int64_t i = 0; i < d.blocks; ++i) {
        const DecoderBlock &b = d.block[i];
        if (!holds(b.keys, b.cache_bytes[0], cached) || !holds(b.values, b.cache_bytes[1], cached) || !holds(b.key_scales, b.cache_bytes[2], scales) ||
            !holds(b.value_scales, b.cache_bytes[3], scales))
            return BAD_SIZE;
    }
    return DONE;
}

// Whether one step of a team of `threads` stays inside the cache, the tables and the scratch.
static inline int32_t check_step(const Decoder &d, const float *embedding, int64_t embedding_bytes, int64_t position,
                                 const float *logits, int64_t logits_bytes, int64_t threads) {
    if (!holds(embedding, embedding_bytes, 4 * d.hidden) || !holds(logits, logits_bytes, 4 * d.vocabulary)) return BAD_SIZE;
    return d.cache_kind == FP32 ? check_state(d, position, 1, threads) : BAD_NUMBER;
}

// The same for a step of several sequences.
static inline int32_t check_batch(const Decoder &d, const Batch &b, int64_t threads) {
    const int64_t n = d.sequences;
    if (!within(n, 1, LARGEST_SEQUENCES) || !within(b.count, 1, LARGEST_ROWS / n) || !within(b.wanted, 0, b.count)) return BAD_NUMBER;
    const int64_t rows = n * b.count;
    if (rows > d.rows || !within(b.slot, 0, d.capacity - b.count)) return BAD_NUMBER;
    if (!holds(b.embeddings, b.bytes[0], 4 * rows * d.hidden) || !holds(b.positions, b.bytes[1], 8 * rows) ||
        !holds(b.first, b.bytes[2], 8 * n) || !holds(b.logits, b.bytes[3], 4 * n * b.wanted * d.vocabulary))
        return BAD_SIZE;
    if (const int32_t bad = check_state(d, b.slot, n, threads)) return bad;
    for (int64_t k = 0; k < rows; ++k)
        if (!within(b.positions[k], 0, d.capacity - 1)) return BAD_NUMBER;
    for (int64_t k = 0; k < n; ++k)
        if (!within(b.first[k], 0, b.slot + b.count - 1)) return BAD_NUMBER;
    return DONE;
}

}  // namespace halfplate
