// The C entry points, and the choice of instruction set made once at load time.

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "armor.h"
#include "checks.h"
#include "decoder_checks.h"
#include "pack.h"
#include "runtime.h"

namespace halfplate {
namespace {

struct Functions {
    const Stages &stages;
    const Runtime &runtime;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

// HALFPLATE_ISA never selects what the processor lacks; native.py refuses that before.
Functions choose() {
    const char *forced = std::getenv("HALFPLATE_ISA");
    [[maybe_unused]] const bool any = forced == nullptr || *forced == '\0';
#if defined(__x86_64__)
    if (has_avx512() && (any || std::strcmp(forced, "avx512") == 0)) return {stages_avx512, runtime_avx512};
    if (has_avx2() && (any || std::strcmp(forced, "avx2") == 0)) return {stages_avx2, runtime_avx2};
#endif
    return {stages_baseline, runtime_baseline};
}

const Functions &functions() {
    static const Functions chosen = choose();
    return chosen;
}

const Stages &stages() { return functions().stages; }
const Runtime &runtime() { return functions().runtime; }

// Scratch that a calling thread keeps from call to call: allocating new pages would cost more than the computation.
float *scratch(int64_t floats) {
    struct Kept {
        float *data = nullptr;
        int64_t count = 0;
        ~Kept() { ::operator delete(data, std::align_val_t(64)); }
    };
    thread_local Kept kept;
    if (kept.count < floats) {
        ::operator delete(kept.data, std::align_val_t(64));
        kept.data = nullptr;
        kept.count = 0;
        kept.data = static_cast<float *>(::operator new(size_t(4 * floats), std::align_val_t(64)));
        kept.count = floats;
    }
    return kept.data;
}

// Runs a stage of the solver. Returns a Status if memory is short, because no exception may leave C.
template <class Work>
int32_t guarded(Work work) {
    try {
        work();
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return DONE;
}

// Applies jobs in one parallel region, with the scratch that they need.
int32_t applied(Job *jobs, int64_t count, int64_t threads) {
    const Runtime &run = runtime();
    int64_t inputs = 0, apart = 0;
    for (int64_t j = 0; j < count; ++j) {
        inputs += run.input_floats(*jobs[j].matrix, jobs[j].tokens);
        const int64_t share = run.share_floats(*jobs[j].matrix, jobs[j].tokens);
        apart = share > apart ? share : apart;
    }
    float *next = nullptr;
    const int32_t failed = guarded([&] { next = scratch(inputs + threads * apart); });
    if (failed) return failed;
    for (int64_t j = 0; j < count; ++j) {
        jobs[j].scratch = next;
        next += run.input_floats(*jobs[j].matrix, jobs[j].tokens);
    }
    for (int64_t j = 0; j < count; ++j) jobs[j].shared = next, jobs[j].apart = apart;
    if (threads == 1) run.apply(jobs, count, 0, 1);
    else {
#pragma omp parallel num_threads(threads)
        run.apply(jobs, count, omp_get_thread_num(), omp_get_num_threads());
    }
    return DONE;
}

int32_t moments(Stage stage, const Problem *p, double *cross, double *square, int64_t moment_bytes, int64_t wanted,
                double *losses, int64_t loss_bytes) {
    if (!holds(cross, moment_bytes, wanted) || !holds(square, moment_bytes, wanted)) return BAD_SIZE;
    Problem bounded = *p;
    bounded.threads = team(p->threads);
    return guarded([&] { stage(bounded, cross, square, losses); });
}

}  // namespace
}  // namespace halfplate

#define EXPORT __attribute__((visibility("default")))

// Every entry point receives the size in bytes of each buffer, checks it before it writes anything, and returns a
// Status (checks.h).
extern "C" {

EXPORT const char *halfplate_isa() { return halfplate::stages().isa; }

// The instruction sets that this processor has, the fastest last.
EXPORT const char *halfplate_isas() {
#if defined(__x86_64__)
    if (halfplate::has_avx512()) return "baseline avx2 avx512";
    if (halfplate::has_avx2()) return "baseline avx2";
#endif
    return "baseline";
}

EXPORT int32_t halfplate_output_moments(const halfplate::Problem *p, double *cross, double *square, int64_t moment_bytes,
                                        double *losses, int64_t loss_bytes) {
    if (p == nullptr || p->threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_problem(*p, losses, loss_bytes)) return bad;
    return halfplate::moments(halfplate::stages().output_moments, p, cross, square, moment_bytes,
                              8 * p->row_tiles * p->row_tile * p->row_tile, losses, loss_bytes);
}

EXPORT int32_t halfplate_input_moments(const halfplate::Problem *p, double *cross, double *square, int64_t moment_bytes,
                                       double *losses, int64_t loss_bytes) {
    if (p == nullptr || p->threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_problem(*p, losses, loss_bytes)) return bad;
    return halfplate::moments(halfplate::stages().input_moments, p, cross, square, moment_bytes,
                              8 * p->col_tiles * p->col_tile * p->col_tile, losses, loss_bytes);
}

EXPORT int32_t halfplate_sweep(const halfplate::Problem *p, double *losses, int64_t loss_bytes) {
    if (p == nullptr || p->threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_problem(*p, losses, loss_bytes)) return bad;
    halfplate::Problem bounded = *p;
    bounded.threads = halfplate::team(p->threads);
    return halfplate::guarded([&] { halfplate::stages().sweep(bounded, nullptr, nullptr, losses); });
}

EXPORT int32_t halfplate_gram_sweep(const halfplate::GramSweep *p) {
    if (p == nullptr || p->threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_gram_sweep(*p)) return bad;
    halfplate::GramSweep bounded = *p;
    bounded.threads = halfplate::team(p->threads);
    return halfplate::guarded([&] { halfplate::stages().gram_sweep(bounded); });
}

EXPORT int32_t halfplate_rows(const halfplate::Rows *p) {
    if (p == nullptr || p->threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_rows(*p, p->sweeps + p->rounds)) return bad;
    halfplate::Rows bounded = *p;
    bounded.threads = halfplate::team(p->threads);
    return halfplate::guarded([&] { halfplate::stages().rows(bounded); });
}

EXPORT int32_t halfplate_affine_rows(const halfplate::AffineRows *p) {
    if (p == nullptr || p->rows.threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_affine_rows(*p)) return bad;
    halfplate::AffineRows bounded = *p;
    bounded.rows.threads = halfplate::team(p->rows.threads);
    return halfplate::guarded([&] { halfplate::stages().affine_rows(bounded); });
}

// Sets the offsets and the size of a header whose other fields are set.
EXPORT int32_t halfplate_place(halfplate::Packed *header, int32_t bias) {
    if (header == nullptr || !halfplate::sensible(*header)) return halfplate::BAD_HEADER;
    halfplate::place(*header, bias != 0);
    return halfplate::DONE;
}

// Also returns the refusals of pack.h. Bytes between the parts become 0, so that equal matrices have equal bytes.
EXPORT int32_t halfplate_pack(halfplate::Packed *packed, int64_t packed_bytes, const halfplate::Stored *stored, int64_t threads) {
    if (!halfplate::sound(packed, packed_bytes)) return halfplate::BAD_HEADER;
    if (threads < 1) return halfplate::BAD_NUMBER;
    if (stored == nullptr || !halfplate::holds_stored(*packed, *stored)) return halfplate::BAD_SIZE;
    uint8_t *bytes = reinterpret_cast<uint8_t *>(packed);
    for (int64_t end : {packed->core, packed->scales, packed->in_blocks, packed->in_scales, packed->out_blocks, packed->out_scales, packed->bias, packed->nbytes}) {
        const int64_t start = end - 64 > int64_t(sizeof *packed) ? end - 64 : int64_t(sizeof *packed);
        if (end > start) std::memset(bytes + start, 0, size_t(end - start));
    }
    return halfplate::pack(*packed, *stored, halfplate::team(threads));
}

EXPORT int32_t halfplate_unpack(const halfplate::Packed *packed, int64_t packed_bytes, const halfplate::Stored *stored,
                                int64_t threads) {
    if (!halfplate::sound(packed, packed_bytes)) return halfplate::BAD_HEADER;
    if (threads < 1) return halfplate::BAD_NUMBER;
    if (stored == nullptr || !halfplate::holds_stored(*packed, *stored)) return halfplate::BAD_SIZE;
    halfplate::unpack(*packed, *stored, halfplate::team(threads));
    return halfplate::DONE;
}

// One linear: y (tokens, d_out), contiguous, of x (tokens, d_in), rows ldx apart.
EXPORT int32_t halfplate_linear(const halfplate::Packed *packed, int64_t packed_bytes, const float *x, int64_t x_bytes,
                                int64_t ldx, float *y, int64_t y_bytes, int64_t tokens, int64_t threads) {
    if (!halfplate::sound(packed, packed_bytes)) return halfplate::BAD_HEADER;
    if (threads < 1) return halfplate::BAD_NUMBER;
    if (!halfplate::holds_rows(x, x_bytes, tokens, packed->d_in, ldx) ||
        !halfplate::holds_rows(y, y_bytes, tokens, packed->d_out, packed->d_out))
        return halfplate::BAD_SIZE;
    halfplate::Job job{packed, x, ldx, y, packed->d_out, tokens, nullptr, nullptr, 0, false};
    return halfplate::applied(&job, 1, halfplate::team(threads));
}

// Linears that each multiply their own rows of x (x_rows, d_in), rows ldx apart, into their own rows and columns of y (y_rows, width), which
// is contiguous and whose other values stay as they are. Members may share rows of x, and no values of y.
EXPORT int32_t halfplate_group(const halfplate::Member *members, int64_t members_bytes, int64_t count, const float *x, int64_t x_bytes,
                               int64_t x_rows, int64_t d_in, int64_t ldx, float *y, int64_t y_bytes, int64_t y_rows, int64_t width,
                               int64_t threads) {
    if (threads < 1 || !halfplate::within(count, 1, halfplate::LARGEST_GROUP_CALL)) return halfplate::BAD_NUMBER;
    if (!halfplate::within(d_in, 1, halfplate::LARGEST_SIDE) || !halfplate::within(width, 1, halfplate::LARGEST_SIDE)) return halfplate::BAD_NUMBER;
    if (!halfplate::holds(members, members_bytes, count * int64_t(sizeof(halfplate::Member))) ||
        !halfplate::holds_rows(x, x_bytes, x_rows, d_in, ldx) || !halfplate::holds_rows(y, y_bytes, y_rows, width, width))
        return halfplate::BAD_SIZE;
    for (int64_t m = 0; m < count; ++m)
        if (const int32_t bad = halfplate::check_member(members[m], x_rows, d_in, y_rows, width)) return bad;
    std::vector<halfplate::Job> jobs;
    const int32_t failed = halfplate::guarded([&] { jobs.resize(size_t(count)); });
    if (failed) return failed;
    for (int64_t m = 0; m < count; ++m) {
        const halfplate::Member &own = members[m];
        jobs[size_t(m)] = {own.matrix, x + own.from * ldx, ldx, y + own.to * width + own.column, width, own.tokens, nullptr, nullptr, 0, false};
    }
    return halfplate::applied(jobs.data(), count, halfplate::team(threads));
}

// One wrapper, A if out_side, else B: y contiguous, rows of x ldx apart.
EXPORT int32_t halfplate_wrap(const halfplate::Packed *packed, int64_t packed_bytes, int32_t out_side, const float *x,
                              int64_t x_bytes, int64_t ldx, float *y, int64_t y_bytes, int64_t tokens, int64_t threads) {
    if (!halfplate::sound(packed, packed_bytes) || (out_side ? packed->out_block : packed->in_block) == 0)
        return halfplate::BAD_HEADER;
    if (threads < 1) return halfplate::BAD_NUMBER;
    const int64_t size = out_side ? packed->d_out : packed->d_in;
    if (!halfplate::holds_rows(x, x_bytes, tokens, size, ldx) || !halfplate::holds_rows(y, y_bytes, tokens, size, size))
        return halfplate::BAD_SIZE;
#pragma omp parallel num_threads(halfplate::team(threads))
    halfplate::runtime().wrap(*packed, out_side != 0, x, ldx, y, size, tokens, omp_get_thread_num(), omp_get_num_threads());
    return halfplate::DONE;
}

EXPORT int32_t halfplate_expand(const halfplate::Packed *packed, int64_t packed_bytes, void *out, int64_t out_bytes, int32_t bf16,
                                int64_t threads) {
    if (!halfplate::sound(packed, packed_bytes) || packed->activations == halfplate::BYTES) return halfplate::BAD_HEADER;
    if (threads < 1) return halfplate::BAD_NUMBER;
    if (!halfplate::holds(out, out_bytes, packed->d_out * packed->d_in * (bf16 ? 2 : 4))) return halfplate::BAD_SIZE;
#pragma omp parallel num_threads(halfplate::team(threads))
    halfplate::runtime().expand(*packed, out, bf16 != 0, omp_get_thread_num(), omp_get_num_threads());
    return halfplate::DONE;
}

// Number of scratch floats for a step of this decoder, or a negative Status; the cache and the tables need not exist yet.
EXPORT int64_t halfplate_decoder_scratch(halfplate::Decoder *decoder, int64_t threads) {
    if (decoder == nullptr || threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_decoder(*decoder, true)) return bad;
    decoder->sized_threads = halfplate::team(threads);
    decoder->sized_capacity = decoder->capacity;
    decoder->sized_sequences = decoder->sequences;
    decoder->sized_rows = decoder->rows;
    const halfplate::Runtime &run = halfplate::runtime();
    const int64_t one = run.decoder_scratch(*decoder, decoder->sized_threads), many = run.batch_scratch(*decoder, decoder->sized_threads);
    decoder->sized_floats = one > many ? one : many;
    return decoder->sized_floats;
}

EXPORT int32_t halfplate_step(const halfplate::Decoder *decoder, const float *embedding, int64_t embedding_bytes, int64_t position,
                              float *logits, int64_t logits_bytes, int64_t threads) {
    if (decoder == nullptr || threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_decoder(*decoder, false)) return bad;
    threads = halfplate::team(threads);
    if (const int32_t bad =
            halfplate::check_step(*decoder, embedding, embedding_bytes, position, logits, logits_bytes, threads))
        return bad;
#pragma omp parallel num_threads(threads)
    halfplate::runtime().step(*decoder, embedding, position, logits, omp_get_thread_num(), omp_get_num_threads());
    return halfplate::DONE;
}

// `batch->count` tokens of each of `decoder->sequences` sequences.
EXPORT int32_t halfplate_step_batch(const halfplate::Decoder *decoder, const halfplate::Batch *batch, int64_t threads) {
    if (decoder == nullptr || batch == nullptr || threads < 1) return halfplate::BAD_NUMBER;
    if (const int32_t bad = halfplate::check_decoder(*decoder, false)) return bad;
    threads = halfplate::team(threads);
    if (const int32_t bad = halfplate::check_batch(*decoder, *batch, threads)) return bad;
#pragma omp parallel num_threads(threads)
    halfplate::runtime().step_batch(*decoder, *batch, omp_get_thread_num(), omp_get_num_threads());
    return halfplate::DONE;
}

// One token for each row of logits (rows, vocabulary) at its chance in [0, 1); -1 if a logit of the row is NaN or inf, or all are -inf.
EXPORT int32_t halfplate_draw(const float *logits, int64_t logits_bytes, int64_t rows, int64_t vocabulary, float temperature,
                              const double *chances, int64_t chances_bytes, int64_t *tokens, int64_t tokens_bytes, int64_t threads) {
    if (threads < 1 || !halfplate::within(vocabulary, 1, halfplate::LARGEST_SIDE) || !(temperature > 0)) return halfplate::BAD_NUMBER;
    if (!halfplate::holds_rows(logits, logits_bytes, rows, vocabulary, vocabulary) || !halfplate::holds(chances, chances_bytes, 8 * rows) ||
        !halfplate::holds(tokens, tokens_bytes, 8 * rows))
        return halfplate::BAD_SIZE;
#pragma omp parallel for num_threads(halfplate::team(threads)) schedule(static, 1)
    for (int64_t row = 0; row < rows; ++row)
        tokens[row] = halfplate::runtime().draw(logits + row * vocabulary, vocabulary, temperature, chances[row]);
    return halfplate::DONE;
}

// Sum of the bytes of a buffer as fast as it can be read, for measuring bandwidth; NaN if there is no buffer.
EXPORT float halfplate_read(const float *data, int64_t bytes, int64_t threads) {
    if (data == nullptr || bytes < 4 || threads < 1) return __builtin_nanf("");
    const int64_t count = bytes / 4;
    float sum = 0;
#pragma omp parallel num_threads(halfplate::team(threads)) reduction(+ : sum)
    {
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t from = count * thread / all, to = count * (thread + 1) / all;
        sum += halfplate::runtime().read(data + from, to - from);
    }
    return sum;
}
}
