// What the fastest way through memory depends on, and no result: each processor is best with other values, so they are
// measured on the machine at hand (tuning.py, which holds the ctypes twin: same order, same types).
#pragma once

#include <cstdint>

namespace gf {

// Where a prefetched line goes: nowhere (it is not prefetched), every cache level, level 2 and up, or past level 2 as
// what is read once.
enum Hint : int32_t { kNoHint = 0, kToL1 = 1, kToL2 = 2, kOnce = 3 };

struct Fetch {
  int32_t hint;
  int32_t distance;  // bytes from a line that is read to the one to fetch
};

struct Tuning {
  Fetch one_row{kOnce, 4096};   // of a block over one row of inputs
  Fetch few_rows{kOnce, 4096};  // of a block over several rows, where it is the only one
  int32_t both_tiles = 0;       // one row reads a pair of tiles: 0 one after the other, 1 both in turn
  int32_t row_block = 8;        // rows to a block at most
  int32_t chunks_each = 8;      // chunks of a phase to a thread, where there is that much
};

}  // namespace gf
