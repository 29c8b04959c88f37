// The runtime half: compressed and dense linears in kernel layout, and a decoder step made of them. A plain C ABI over
// raw pointers, no Python and no torch headers.
#pragma once

#include <cstdint>

namespace halfplate {

// From INT8 on, values have scales. A value of TABLE is a code of 4 bits whose number stands in a table, and one of FIVE a code of 5 bits.
// FIVE is only for dense cores and activations in floats.
enum Kind : int32_t { FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3, INT4 = 4, TABLE = 5, FIVE = 6 };
enum Activations : int32_t { FLOAT = 0, BYTES = 1 };

// A core is cut into bands of 4 units; a unit is a pair of rows if the core is 2:4 sparse and one row if it is dense.
constexpr int64_t UNITS = 4;
constexpr int64_t TILE = 128;       // columns of a tile, and of a scale of int8 activations
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
};

// One matrix of a grouped call, with its own rows of the input and its own rows and columns of the output.
struct Member {
    const Packed *matrix;
    int64_t bytes;                         // of the packed matrix
    int64_t from, to, tokens;              // first row of the input and of the output, and number of rows
    int64_t column, d_out;                 // first column of the output, and number of columns
};

// The weights of a Llama-shaped decoder and the state of one sequence or several; see decoder.inc and batch.inc.
struct DecoderBlock {
    const float *input_norm, *post_norm;   // (hidden)
    const Packed *q, *k, *v, *o, *gate, *up, *down;
    void *keys, *values;                   // (sequences, kv_heads, capacity, head_dim), the cache
    const float *query_norm, *key_norm;    // (head_dim), or null: norms of each head before its rotation
    int64_t norm_bytes[4], linear_bytes[7], cache_bytes[2];  // of the norms, the linears, and keys and values, in this order
};

struct Decoder {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, vocabulary, blocks, capacity;
    float epsilon, embedding_scale, attention_scale;
    const float *cosines, *sines;          // (capacity, head_dim), tables of the rotary embedding
    const float *final_norm;               // (hidden)
    const Packed *head;
    const DecoderBlock *block;
    float *scratch;                        // halfplate_decoder_scratch floats, from a multiple of 64 bytes
    int64_t table_bytes[2], final_norm_bytes, head_bytes, block_bytes, scratch_bytes;  // of what these point to
    int64_t sized_threads, sized_capacity, sized_sequences, sized_floats;  // written by halfplate_decoder_scratch: the arguments and the result of its last call
    int64_t sequences;
    int64_t cache_kind;                    // FP32; or BF16, only for several sequences and a head_dim that is a multiple of 16
};

// The input of a step of several sequences. All have the same length, padding included.
struct Batch {
    const float *embeddings;               // (sequences, hidden)
    int64_t slot;                          // position in the cache of the new tokens
    const int64_t *positions;              // (sequences), rows of the tables
    const int64_t *first;                  // (sequences), first position in the cache that each sequence reads
    float *logits;                         // (sequences, vocabulary)
    int64_t bytes[4];                      // of each of these buffers, in this order
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
    // One token of each of several sequences; called by every thread.
    void (*step_batch)(const Decoder &decoder, const Batch &batch, int64_t thread, int64_t threads);
    int64_t (*batch_scratch)(const Decoder &decoder, int64_t threads);
    // The token at `chance` of the cumulative distribution of softmax(logits / temperature), or -1 if a logit is NaN or inf, or all are -inf.
    int64_t (*draw)(const float *logits, int64_t count, float temperature, double chance);
    // Sum of the bytes of a buffer as fast as it can be read, for measuring bandwidth.
    float (*read)(const float *data, int64_t count);
};

extern const Runtime runtime_baseline, runtime_avx2, runtime_avx512;

}  // namespace halfplate
