// What is known of the row in a slot, in a quarter of a cache line: the hit path reads and writes nothing else.
//
//   stamp    batch 31 | position 21 | pace 6 | queue 4 | used 1 | dirty 1
//            batch, position: the last batch that used the slot, and where in that batch's ids it did so last. One store records
//            recency, counts uniqueness, remembers whom a row was used beside, and pins: see slot_directory.h.
//            pace: how soon its row comes again, as far as is known (reuse_rates.h).
//            queue, used: its place in the eviction order (eviction_order.h): 0, or 1 + the queue that it is in; whether a batch has used it
//            since it came there.
//   window   bit w % 64: batch w, announced and not begun, will use the row. At most 64 batches are announced at a time.
//
// A free slot is all zero.
#pragma once

#include <bit>
#include <cstdint>

namespace mtrains {

struct Stamp {
  static constexpr uint64_t kDirty = 1, kUsed = 2;
  static constexpr int kQueueShift = 2, kPaceShift = 6, kPositionShift = 12, kBatchShift = 33;
  static constexpr uint64_t kQueue = uint64_t{15} << kQueueShift, kPace = uint64_t{63} << kPaceShift;
  static constexpr uint64_t kFlags = (uint64_t{1} << kPositionShift) - 1;
  static constexpr uint64_t kPositions = (uint64_t{1} << (kBatchShift - kPositionShift)) - 1;

  uint64_t value;

  static Stamp of(uint32_t batch, bool dirty) { return {uint64_t{batch} << kBatchShift | (dirty ? kDirty : 0)}; }  // position 0
  // Of more than 2^21 ids in a batch the order is that of their low bits.
  Stamp at(int64_t position) const { return {value | (static_cast<uint64_t>(position) & kPositions) << kPositionShift}; }
  uint32_t batch() const { return static_cast<uint32_t>(value >> kBatchShift); }
  uint64_t order() const { return value & ~kFlags; }  // by batch, then position
};

struct SlotState {
  uint64_t stamp;
  uint64_t window;

  uint32_t batch() const { return Stamp{stamp}.batch(); }
  bool dirty() const { return stamp & Stamp::kDirty; }
  bool used() const { return stamp & Stamp::kUsed; }
  bool linked() const { return stamp & Stamp::kQueue; }
  uint32_t queue() const { return static_cast<uint32_t>((stamp & Stamp::kQueue) >> Stamp::kQueueShift) - 1; }  // of a linked one
  uint32_t pace() const { return static_cast<uint32_t>((stamp & Stamp::kPace) >> Stamp::kPaceShift); }
  bool awaited() const { return window != 0; }
  void set_queue(uint32_t queue) { stamp = (stamp & ~(Stamp::kQueue | Stamp::kUsed)) | uint64_t{queue + 1} << Stamp::kQueueShift; }
  void unlink() { stamp &= ~Stamp::kQueue; }
  void set_batch(uint32_t batch) { stamp = (stamp << 31 >> 31) | uint64_t{batch} << Stamp::kBatchShift; }
};
static_assert(sizeof(SlotState) == 16);

// Which of the batches that were announced uses a row next. `first`: the oldest that has not begun.
inline uint64_t next_use(uint64_t window, uint64_t first) {
  return first + static_cast<uint64_t>(std::countr_zero(std::rotr(window, static_cast<int>(first % 64))));
}

}  // namespace mtrains
