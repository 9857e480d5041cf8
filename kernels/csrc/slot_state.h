// What is known of the row in a slot, in a quarter of a cache line: the hit path reads and writes nothing else.
//
//   stamp    batch 31 | position 28 | linked 1 | main 1 | uses 2 | dirty 1
//            batch, position: the last batch that used the slot, and where in that batch's ids it did so last. One store records
//            recency, counts uniqueness, remembers whom a row was used beside, and pins: see slot_directory.h.
//            linked, main, uses: its place in the eviction order (eviction_order.h). uses: batches that used the row since it
//            came or last went round its list, 2 at most: with 3, S3-FIFO's own number, hot rows that cool stay longer than they are
//            worth (misses of drifting traces are up to 1% more, of still ones 0.5% less).
//   window   bit w % 64: batch w, announced and not begun, will use the row. At most 64 batches are announced at a time.
//
// A free slot is all zero.
#pragma once

#include <bit>
#include <cstdint>

namespace mtrains {

struct Stamp {
  static constexpr uint64_t kDirty = 1, kOneUse = 2, kUses = 6, kMostUses = 2 * kOneUse, kMain = 8, kLinked = 16, kFlags = 31;
  static constexpr int kPositionShift = 5, kBatchShift = 33;
  static constexpr uint64_t kPositions = (uint64_t{1} << (kBatchShift - kPositionShift)) - 1;

  uint64_t value;

  static Stamp of(uint32_t batch, bool dirty) { return {uint64_t{batch} << kBatchShift | (dirty ? kDirty : 0)}; }  // position 0
  // Of more than 2^28 ids in a batch the order is that of their low bits.
  Stamp at(int64_t position) const { return {value | (static_cast<uint64_t>(position) & kPositions) << kPositionShift}; }
  uint32_t batch() const { return static_cast<uint32_t>(value >> kBatchShift); }
  uint64_t order() const { return value & ~kFlags; }  // by batch, then position
};

struct SlotState {
  uint64_t stamp;
  uint64_t window;

  uint32_t batch() const { return Stamp{stamp}.batch(); }
  bool dirty() const { return stamp & Stamp::kDirty; }
  bool linked() const { return stamp & Stamp::kLinked; }
  bool main() const { return stamp & Stamp::kMain; }
  uint64_t uses() const { return (stamp & Stamp::kUses) / Stamp::kOneUse; }
  bool awaited() const { return window != 0; }
  void set_batch(uint32_t batch) { stamp = (stamp << 31 >> 31) | uint64_t{batch} << Stamp::kBatchShift; }
};
static_assert(sizeof(SlotState) == 16);

// Which of the batches that were announced uses a row next. `first`: the oldest that has not begun.
inline uint64_t next_use(uint64_t window, uint64_t first) {
  return first + static_cast<uint64_t>(std::countr_zero(std::rotr(window, static_cast<int>(first % 64))));
}

}  // namespace mtrains
