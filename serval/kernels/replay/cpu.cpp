// A recorded list of kernel calls, made again one after the other. Floor: none of its own, a call costs a few nanoseconds.
#include "simd.h"

struct Call { int (*function)(const int64_t*); const int64_t* arguments; };

// Returns 0, or the number (from 1) of the call that failed, where it stops.
EXPORT int replay(const void* calls, int64_t count) {
  static_assert(sizeof(Call) == 16, "two 64-bit fields: Python writes these records");
  for (int64_t i = 0; i < count; i++) {
    const Call& call = ((const Call*)calls)[i];
    if (call.function(call.arguments)) return (int)i + 1;
  }
  return 0;
}
