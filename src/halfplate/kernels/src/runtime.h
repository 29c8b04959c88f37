// The runtime half: compressed and dense linears in kernel layout, and a decoder step made of them. A plain C ABI over
// raw pointers, no Python and no torch headers.
#pragma once

#include <cstdint>

namespace halfplate {

// From INT8 on, values have scales. A value of TABLE is a code of 4 bits whose number stands in a table, and one of FIVE a code of 5 bits.
// FIVE is only for dense cores and activations in floats.
enum Kind : int32_t { FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3, INT4 = 4, TABLE = 5, FIVE = 6 };
// How a matrix takes its inputs: in floats; rounded to int8; or in floats for few tokens and rounded for many, in the layout for floats.
enum Activations : int32_t { FLOAT = 0, BYTES = 1, MANY_BYTES = 2 };

// A core is cut into bands of 4 units; a unit is a pair of rows if the core is 2:4 sparse and one row if it is dense.
constexpr int64_t UNITS = 4;
constexpr int64_t TILE = 128;       // columns of a tile, and of a scale of BYTES
constexpr int64_t META = 32;        // bytes of positions of one unit and tile
constexpr uint64_t MAGIC = 0x3174616c70666c68;  // "hlfplat1"

// The packed form of one linear: this header, then the parts that it points to, each from a multiple of 64 bytes.
struct Packed {
    uint64_t magic;
    int64_t d_out, d_in;
    int32_t kind, sparse, activations, wrapper_kind;
    int64_t out_block, in_block;           // 0 if there is no wrapper
    int64_t group;                         // columns of a scale: 32, 64 or TILE; TILE without scales
    int8_t table[32];                      // the number of each code (two's complement), each above -128: 16 of a TABLE, 32 of FIVE; else 0
    int64_t core, scales, in_blocks, in_scales, out_blocks, out_scales, bias;  // byte offsets from the header, 0: absent
    int64_t nbytes;                        // total bytes, including this header
};

// The stored tensors of one linear (docs/format.md); absent ones are null.
struct Stored {
    void *weight, *index, *scales;
    void *out_blocks, *out_tail, *out_scales;
    void *in_blocks, *in_tail, *in_scales;
    void *bias;                            // fp32 (d_out)
    int64_t bytes[10];                     // of each of these, in this order
};

// One of the linears that are applied in one call: y (tokens, d_out) = x (A S B)^T + bias.
struct Job {
    const Packed *matrix;
    const float *x;                        // (tokens, d_in), rows ldx apart
    int64_t ldx;
    float *y;                              // (tokens, d_out), rows ldy apart
    int64_t ldy;
    int64_t tokens;
    float *scratch;                        // 64-byte aligned: input_floats floats, or scratch_floats without `shared`
    float *shared;                         // of all jobs of a call: room of each thread for one share, share_floats floats
    int64_t apart;                         // floats between the room of two threads
    bool exact;                            // inputs of MANY_BYTES stay in floats, whatever their number
};

// One matrix of a grouped call, with its own rows of the input and its own rows and columns of the output.
struct Member {
    const Packed *matrix;
    int64_t bytes;                         // of the packed matrix
    int64_t from, to, tokens;              // first row of the input and of the output, and number of rows
    int64_t column, d_out;                 // first column of the output, and number of columns
};

// The weights of a decoder and the state of one sequence or several; see decoder.inc and batch.inc.

// How a decoder normalises: by the root of the mean square, or by mean and variance (LayerNorm).
enum Norm : int64_t { RMS = 0, MEAN = 1 };
// Activations of an MLP. GELU_TANH approximates GELU with a hyperbolic tangent; RELU2 is the square of what is positive; CLAMPED is that of
// gpt-oss: g logistic(alpha g) (1 + u), where g = min(gate(x), limit) and u = up(x) within -limit and limit.
enum Activation : int64_t { SILU = 0, GELU_TANH = 1, GELU = 2, RELU2 = 3, CLAMPED = 4 };

// The linears of an MLP: down(activation(gate(x)) * up(x)). Without `up`, `gate` has the outputs of both, those of the gate first; or, in a
// decoder without gates, the only ones.
struct Expert {
    const Packed *gate, *up, *down;
    int64_t bytes[3];                      // of these
};

constexpr int64_t LARGEST_GROUPS = 64;

// A mixture of experts: each token goes through the `chosen` experts of the largest score, a softmax or the logistic function of the router's outputs.
struct Mixture {
    const Packed *router;                  // (experts, hidden)
    const float *correction;               // (experts), or null: added to scores to choose experts, and not part of their weights
    const Expert *expert;
    int64_t experts, chosen;               // both 0: the block has one MLP
    int64_t normalised;                    // 1: the weights of a token's experts are divided by their sum
    int64_t logistic;                      // 1: scores are not a softmax
    int64_t groups, chosen_groups;         // of equally many experts: experts are chosen in those whose two best have the largest sum; both 1: all
    int64_t router_bytes, correction_bytes, expert_bytes;  // of what these point to
    Expert shared;                         // of every token, unless its number of intermediates is 0
    const Packed *shared_gate;             // (1, hidden): the weight of the shared expert is logistic(this(x)); null: 1
    int64_t shared_intermediate, shared_gate_bytes;
    float scale, least_sum;                // of all weights; and of what they are divided by
};

// A block: x += residual_scale * norms[1](attention(norms[0](x))), then x += residual_scale * norms[3](MLP(norms[2](x))). A norm that is null
// changes nothing. Weights of a norm of `count` numbers: (count), or of kind MEAN (2, count) with a bias.
struct DecoderBlock {
    const float *norms[4];                 // of hidden numbers
    const float *query_norm, *key_norm;    // of head_dim numbers for each head, or of those of all heads; or null
    const Packed *q, *k, *v, *o;           // k and v null: q has the outputs of all three
    const float *sinks;                    // (heads), or null: a score that attention counts and that belongs to no position
    Expert mlp;                            // unless there is a mixture
    Mixture mixture;
    void *keys, *values;                   // (sequences, kv_heads, capacity, head_dim), the cache
    float *key_scales, *value_scales;      // (sequences, kv_heads, capacity), if it is of kind INT8; else null
    int64_t intermediate;                  // between gate and down, of every expert
    int64_t window;                        // the number of positions that are read, the new one included; 0: all
    int64_t rotary;                        // which tables rotate heads; -1: none
    int64_t norm_bytes[6], linear_bytes[4], cache_bytes[4], sink_bytes;  // of the norms, the linears, keys, values and their scales, in this order, and sinks
};

struct Decoder {
    int64_t hidden, heads, kv_heads, head_dim, vocabulary, blocks, capacity;
    int64_t rotary_dim;                    // leading numbers of a head that are rotated
    int64_t rotary_pairs;                  // 0: pairs are (i, i + rotary_dim / 2); 1: (2 i, 2 i + 1), with the angles of i
    int64_t tables;                        // pairs of tables: 0, 1 or 2
    int64_t norm, activation;              // Norm and Activation
    int64_t gated;                         // 1: an MLP has a gate
    int64_t parallel;                      // 1: the MLP reads what attention reads, and norms[2] is null
    int64_t whole_norms;                   // 1: query_norm and key_norm are of all heads together
    int64_t late_norms;                    // 1: they follow the rotation
    float epsilon, embedding_scale, attention_scale, residual_scale, logit_scale;
    float gate_alpha, gate_limit;          // of CLAMPED
    float attention_cap, logit_cap;        // y = cap tanh(x / cap) of scores and of logits; 0: none
    const float *cosines[2], *sines[2];    // (capacity, rotary_dim), tables of the rotary embedding
    const float *final_norm;
    const Packed *head;
    const DecoderBlock *block;
    float *scratch;                        // halfplate_decoder_scratch floats, from a multiple of 64 bytes
    int64_t table_bytes[4];                // of the tables, cosines first
    int64_t final_norm_bytes, head_bytes, block_bytes, scratch_bytes;  // of what these point to
    int64_t sized_threads, sized_capacity, sized_sequences, sized_rows, sized_floats;  // written by halfplate_decoder_scratch: the arguments and the result of its last call
    int64_t sequences, rows;               // rows: most rows of a step, new tokens of all sequences together
    int64_t cache_kind;                    // FP32; or BF16 or INT8, only for steps of a batch and a head_dim that is a multiple of 16
};

// The input of a step of one or several sequences. All have the same length, padding included. A token reads those before it.
struct Batch {
    const float *embeddings;               // (sequences, count, hidden)
    int64_t slot;                          // position in the cache of the first new token
    const int64_t *positions;              // (sequences, count), rows of the tables
    const int64_t *first;                  // (sequences), first position in the cache that each sequence reads
    float *logits;                         // (sequences, wanted, vocabulary)
    int64_t bytes[4];                      // of each of these buffers, in this order
    int64_t count, wanted;                 // new tokens of each sequence, and of how many of the last there are logits
    int64_t exact;                         // 1: inputs of MANY_BYTES stay in floats, whatever the number of rows
};

struct Runtime {
    const char *isa;
    // Called by every thread of a parallel region; has barriers inside and one at its end.
    void (*apply)(const Job *jobs, int64_t count, int64_t thread, int64_t threads);
    int64_t (*input_floats)(const Packed &matrix, int64_t tokens);
    int64_t (*share_floats)(const Packed &matrix, int64_t tokens);
    // The core with its zeros, row-major (d_out, d_in), as fp32 or (bf16 = true) bf16; called by every thread.
    void (*expand)(const Packed &matrix, void *out, bool bf16, int64_t thread, int64_t threads);
    // One wrapper, A if out_side, else B: y = x M^T for all tokens; called by every thread.
    void (*wrap)(const Packed &matrix, bool out_side, const float *x, int64_t ldx, float *y, int64_t ldy, int64_t tokens,
                 int64_t thread, int64_t threads);
    // One token of one sequence; called by every thread.
    void (*step)(const Decoder &decoder, const float *embedding, int64_t position, float *logits, int64_t thread,
                 int64_t threads);
    int64_t (*decoder_scratch)(const Decoder &decoder, int64_t threads);
    // The same number of tokens of each of one or several sequences; called by every thread.
    void (*step_batch)(const Decoder &decoder, const Batch &batch, int64_t thread, int64_t threads);
    int64_t (*batch_scratch)(const Decoder &decoder, int64_t threads);
    // The token at `chance` of the cumulative distribution of softmax(logits / temperature), or -1 if a logit is NaN or inf, or all are -inf.
    int64_t (*draw)(const float *logits, int64_t count, float temperature, double chance);
    // Sum of the bytes of a buffer as fast as it can be read, for measuring bandwidth.
    float (*read)(const float *data, int64_t count);
};

extern const Runtime runtime_baseline, runtime_avx2, runtime_avx512;

}  // namespace halfplate
