// Conversion between the stored form of a linear (docs/format.md) and its packed form.
#pragma once

#include "runtime.h"

namespace halfplate {

enum Refusal : int32_t { ACCEPTED = 0, POSITIONS = 1, NOT_FINITE = 2, CODES = 3 };

// Fills in every offset and nbytes of a header whose other fields are set.
void place(Packed &header, bool bias);

// Writes the parts of `packed`, whose header is placed, from `stored`; returns the reason if the stored values are invalid.
int32_t pack(Packed &packed, const Stored &stored, int64_t threads);

// The inverse of pack; every tensor that is not null is written completely.
void unpack(const Packed &packed, const Stored &stored, int64_t threads);

}  // namespace halfplate
