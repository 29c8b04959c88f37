// ARMOR's stages for one instruction set; setup.py gives each of these files its own compiler flags.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "armor.h"

#define LANES 4

namespace halfplate {
namespace {
#include "vector.inc"
#include "numbers.inc"
#include "tile_algebra.inc"
#include "lane_products.inc"
// The order matters: stages use the group update, which uses the shared forms.
#include "armor_shared.inc"
#include "group_update.inc"
#include "armor_stages.inc"
#include "lane_update.inc"
#include "gram_sweep.inc"
#include "rows.inc"
#include "rows_affine.inc"
}  // namespace
const Stages stages_baseline{"baseline", output_moments, input_moments, sweep, gram_sweep, solve_rows, descend_affine};
}  // namespace halfplate
