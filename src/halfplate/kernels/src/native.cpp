// The C entry points, and the choice of instruction set made once at load time.

#include <cstdlib>
#include <cstring>

#include "armor.h"

namespace halfplate {
namespace {

const Stages &choose() {
    const char *forced = std::getenv("HALFPLATE_ISA");
    const bool any = forced == nullptr || *forced == '\0';
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (any || std::strcmp(forced, "avx512") == 0)) return stages_avx512;
    if (avx2 && (any || std::strcmp(forced, "avx2") == 0)) return stages_avx2;
#endif
    return stages_baseline;
}

const Stages &stages() {
    static const Stages &chosen = choose();
    return chosen;
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
}
