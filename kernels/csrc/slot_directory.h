// SlotDirectory: which row of one table shard sits in which slot of its pool.
//
//   slot_of_row_[row]   0: not resident; s + 1: in slot s; -(k + 1): the k-th miss of the batch being looked up.
//                       4 bytes a row, mapped lazily: rows never touched cost nothing.
//   row_of_slot_[slot]  the row in the slot, or -1 while the slot is free.
//   stamp_[slot]        batch (31 bits) | position (32) | dirty (1): the last batch that used the slot, and where in that
//                       batch's ids it did so last. One store on the hit path records recency, counts uniqueness, remembers
//                       whom a row was used beside, and pins: a slot is pinned while its batch is not older than the oldest
//                       one still outstanding. That is conservative when batches finish out of order; the exact answer
//                       (from the tickets' own slot lists) is asked for only when the quick one finds no room.
//
// Invariants between batches (check() verifies them):
//   - slot_of_row_ and row_of_slot_ are inverse to each other, and no row is provisional;
//   - free slots are exactly those with row -1, they are clean, and stamp_ never exceeds the newest batch.
//
// Eviction order: oldest stamp first, so LRU by the batch, and within a batch the order of its ids. Rows that a sample used
// side by side leave side by side, and a log that takes them in that order has them in one block. One histogram pass over
// the batches collects the oldest eighth of the pool as candidates, sorted; a candidate touched since is skipped.
//
// A batch goes through lookup (per feature) -> reserve -> commit, or rollback. Not thread-safe: SlotPool locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lazy_array.h"

namespace mtrains {

struct Stamp {
  static constexpr int kPositionShift = 1, kBatchShift = 33;

  uint64_t value;

  static Stamp of(uint32_t batch, bool dirty) { return {uint64_t{batch} << kBatchShift | (dirty ? 1u : 0u)}; }  // position 0
  // Of more than 2^32 ids in a batch the order is that of their low bits.
  Stamp at(int64_t position) const { return {value | uint64_t{static_cast<uint32_t>(position)} << kPositionShift}; }
  Stamp as_dirty_as(uint64_t old) const { return {value | (old & 1)}; }
  Stamp where(uint64_t old) const { return {value | (old & ((uint64_t{1} << kBatchShift) - 1))}; }  // its position and dirty bit
  uint32_t batch() const { return static_cast<uint32_t>(value >> kBatchShift); }
};

class SlotDirectory {
 public:
  SlotDirectory(int64_t rows, int32_t pool_rows);

  int64_t rows() const { return static_cast<int64_t>(slot_of_row_.size()); }
  int32_t pool_rows() const { return static_cast<int32_t>(row_of_slot_.size()); }

  // Turns ids[begin, end) of a batch into slots[begin, end). Misses are collected: their slots are -(k + 1) until commit().
  // ids must be in range. Returns the number of distinct rows that this call saw first for this stamp, misses left out.
  template <class Index>
  int64_t lookup(const Index* ids, int64_t begin, int64_t end, Stamp stamp, int64_t* slots);

  std::span<const int64_t> missed_rows() const { return missed_rows_; }

  // Finds a slot for every missed row: free ones, then victims that no batch in [oldest_outstanding, ...] uses.
  // With `pinned` (one flag a slot) that exact answer replaces the stamps. False when there is no room: nothing changed.
  bool reserve(uint32_t oldest_outstanding_batch, Stamp stamp, const std::vector<uint8_t>* pinned);
  std::span<const int32_t> reserved_slots() const { return reserved_; }
  int64_t row_of_slot(int32_t slot) const { return row_of_slot_[slot]; }
  bool dirty(int32_t slot) const { return stamp_[slot] & 1; }

  // Gives the reserved slots to the missed rows, and patches the positions that lookup left open.
  void commit(Stamp stamp, int64_t* slots);
  void rollback();

  int32_t slot_of_row(int64_t row) const { return slot_of_row_[row] - 1; }  // -1: not resident
  void prefetch(int64_t row) const { __builtin_prefetch(&slot_of_row_[static_cast<size_t>(row)]); }
  void touch(int32_t slot, uint32_t batch) { stamp_[slot] = Stamp::of(batch, false).where(stamp_[slot]).value; }
  void mark_dirty(int32_t slot) { stamp_[slot] |= 1; }
  void mark_clean(int32_t slot) { stamp_[slot] &= ~uint64_t{1}; }
  uint32_t batch_of_slot(int32_t slot) const { return Stamp{stamp_[slot]}.batch(); }
  void drop(int32_t slot);  // the row leaves without being written: its fill failed
  void age(uint32_t batches);  // subtract from every stamp, so that batch numbers never run out
  void sort_by_use(std::vector<int32_t>& slots) const;  // into the order in which they would be evicted
  std::vector<int32_t> by_age() const;  // occupied slots, oldest first, at the grain of 1/1024 of the ages there are
  int32_t resident() const { return pool_rows() - static_cast<int32_t>(free_.size()); }
  int64_t evictions() const { return evictions_; }
  void check() const;  // tests: throws std::logic_error at a broken invariant

 private:
  void collect_candidates(uint32_t limit_batch, size_t wanted);

  LazyArray<int32_t> slot_of_row_;
  std::vector<int32_t> row_of_slot_;
  LazyArray<uint64_t> stamp_;
  std::vector<int32_t> free_;
  struct Candidate {
    uint64_t stamp;
    int32_t slot;
  };
  std::vector<Candidate> candidates_;  // oldest last
  std::vector<int64_t> missed_rows_;
  std::vector<int64_t> miss_positions_;
  std::vector<int32_t> reserved_;
  size_t reserved_free_ = 0;  // the first of reserved_ came off free_
  int64_t evictions_ = 0;
};

}  // namespace mtrains
