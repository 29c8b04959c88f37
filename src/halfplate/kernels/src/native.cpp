// The C entry points, and the choice of instruction set made once at load time.

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "armor.h"
#include "layout.h"
#include "pack.h"
#include "runtime.h"

namespace halfplate {
namespace {

struct Functions {
    const Stages &stages;
    const Runtime &runtime;
};

Functions choose() {
    const char *forced = std::getenv("HALFPLATE_ISA");
    const bool any = forced == nullptr || *forced == '\0';
#if defined(__x86_64__)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && (any || std::strcmp(forced, "avx512") == 0)) return {stages_avx512, runtime_avx512};
    if (avx2 && (any || std::strcmp(forced, "avx2") == 0)) return {stages_avx2, runtime_avx2};
#endif
    return {stages_baseline, runtime_baseline};
}

const Functions &functions() {
    static const Functions chosen = choose();
    return chosen;
}

const Stages &stages() { return functions().stages; }
const Runtime &runtime() { return functions().runtime; }

// Scratch that a calling thread keeps from call to call: fresh pages would cost more than the work on them.
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

}  // namespace
}  // namespace halfplate

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT const char *halfplate_isa() { return halfplate::stages().isa; }

EXPORT void halfplate_output_moments(const halfplate::Problem *p, double *cross, double *square, double *losses) {
    halfplate::stages().output_moments(*p, cross, square, losses);
}

EXPORT void halfplate_input_moments(const halfplate::Problem *p, double *cross, double *square, double *losses) {
    halfplate::stages().input_moments(*p, cross, square, losses);
}

EXPORT void halfplate_sweep(const halfplate::Problem *p, double *losses) {
    halfplate::stages().sweep(*p, nullptr, nullptr, losses);
}

EXPORT void halfplate_gram_sweep(const halfplate::GramSweep *p) { halfplate::stages().gram_sweep(*p); }

// Sets the offsets and the size of a header whose other fields are given.
EXPORT void halfplate_place(halfplate::Packed *header, int32_t bias) { halfplate::place(*header, bias != 0); }

EXPORT int32_t halfplate_pack(halfplate::Packed *packed, const halfplate::Stored *stored, int64_t threads) {
    return halfplate::pack(*packed, *stored, threads);
}

EXPORT void halfplate_unpack(const halfplate::Packed *packed, const halfplate::Stored *stored, int64_t threads) {
    halfplate::unpack(*packed, *stored, threads);
}

// Linears that read inputs of as many tokens; their scratch is filled in. Returns 1 where memory ran out.
EXPORT int32_t halfplate_apply(halfplate::Job *jobs, int64_t count, int64_t tokens, int64_t threads) {
    const halfplate::Runtime &run = halfplate::runtime();
    int64_t floats = 0;
    for (int64_t j = 0; j < count; ++j) floats += run.scratch_floats(*jobs[j].matrix, tokens, threads);
    try {
        float *next = halfplate::scratch(floats);
        for (int64_t j = 0; j < count; ++j) {
            jobs[j].scratch = next;
            next += run.scratch_floats(*jobs[j].matrix, tokens, threads);
        }
    } catch (const std::bad_alloc &) {
        return 1;
    }
    if (threads == 1) run.apply(jobs, count, tokens, 0, 1);
    else {
#pragma omp parallel num_threads(threads)
        run.apply(jobs, count, tokens, omp_get_thread_num(), omp_get_num_threads());
    }
    return 0;
}

// One linear: y (tokens, d_out) of x (tokens, d_in), rows ldx and ldy apart.
EXPORT int32_t halfplate_linear(const halfplate::Packed *packed, const float *x, int64_t ldx, float *y, int64_t ldy,
                                int64_t tokens, int64_t threads) {
    halfplate::Job job{packed, x, ldx, y, ldy, nullptr};
    return halfplate_apply(&job, 1, tokens, threads);
}

// One wrapper alone: A where out_side, else B.
EXPORT void halfplate_wrap(const halfplate::Packed *packed, int32_t out_side, const float *x, int64_t ldx, float *y,
                           int64_t ldy, int64_t tokens, int64_t threads) {
#pragma omp parallel num_threads(threads)
    halfplate::runtime().wrap(*packed, out_side != 0, x, ldx, y, ldy, tokens, omp_get_thread_num(), omp_get_num_threads());
}

EXPORT void halfplate_expand(const halfplate::Packed *packed, void *out, int32_t bf16, int64_t threads) {
#pragma omp parallel num_threads(threads)
    halfplate::runtime().expand(*packed, out, bf16 != 0, omp_get_thread_num(), omp_get_num_threads());
}

EXPORT int64_t halfplate_decoder_scratch(const halfplate::Decoder *decoder, int64_t threads) {
    return halfplate::runtime().decoder_scratch(*decoder, threads);
}

EXPORT void halfplate_step(const halfplate::Decoder *decoder, const float *embedding, int64_t position, float *logits,
                           int64_t threads) {
#pragma omp parallel num_threads(threads)
    halfplate::runtime().step(*decoder, embedding, position, logits, omp_get_thread_num(), omp_get_num_threads());
}

EXPORT float halfplate_read(const float *data, int64_t count, int64_t threads) {
    float sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    {
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t from = count * thread / all, to = count * (thread + 1) / all;
        sum += halfplate::runtime().read(data + from, to - from);
    }
    return sum;
}
}
