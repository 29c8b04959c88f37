// The runtime for one instruction set; setup.py gives each of these files its own compiler flags.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "runtime.h"

#define LANES 4

namespace halfplate {
namespace {
#include "vector.inc"
// The order matters: each uses those before it.
#include "widen.inc"
#include "core_float.inc"
#include "core_bytes.inc"
#include "wrappers.inc"
#include "expand.inc"
#include "panel.inc"
#include "byte_words.inc"
#include "byte_panel.inc"
#include "apply.inc"
#include "activations.inc"
#include "attention.inc"
#include "mixture.inc"
#include "decoder.inc"
#include "cached.inc"
#include "prompt_attention.inc"
#include "batch.inc"
#include "draw.inc"
}  // namespace
const Runtime runtime_baseline{"baseline", apply, input_floats, share_floats, expand, wrap, step, decoder_scratch, step_batch, batch_scratch, draw, read_all};
}  // namespace halfplate
