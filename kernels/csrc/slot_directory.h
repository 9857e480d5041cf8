// SlotDirectory: which row of one table shard sits in which slot of its pool.
//
//   slot_of_row_[row]   > 0: in slot s - 1.  0: nothing is known of the row.  < 0 with bit 30: not here; the rest is its pace and
//                       the batch that used it last.  < 0 without: not here; the rest is its place in absent_.
//                       4 bytes a row, mapped lazily: rows never touched cost nothing.
//   row_of_slot_[slot]  the row in the slot, or -1 while the slot is free.
//   order_              the state of every slot (slot_state.h), and who goes first (eviction_order.h).
//   absent_             what is known of rows that are not here (absent_rows.h).
//   wanted_             the absent rows that announced batches will use: one bit a row. Volumes bring them along.
//
// A pool with a slot for every row has row r in slot r, so that a hit reads the slot's state and nothing else. No state of a row that is
// there is all zero: it is in a list, or awaited.
//
// A slot is pinned while its stamp's batch is not older than the oldest one still outstanding. That is conservative when batches
// finish out of order; the exact answer (from the tickets' own slot lists) is asked for only when the quick one finds no room.
//
// A batch may be announced before it is looked up: its bit is set in the window of each of its rows, and cleared by its lookup, or
// by withdraw. All that follows from it is advice: a wrong future costs misses.
//
// Invariants between batches (check() verifies them):
//   - slot_of_row_ and row_of_slot_ are inverse to each other, and no row is missed;
//   - free slots are exactly those with row -1, their state is zero, and no stamp exceeds the newest batch;
//   - absent_ has just the rows that are not here and awaited, and wanted_ the same.
//
// Rows that came side by side are neighbours in the eviction order's lists, and the victims of one batch leave in the order of
// their last use, by batch and then position. So rows that samples use side by side tend to leave side by side, and a log that takes
// them in that order has them in one block. (Drawing a sixteenth of the pool ahead and sorting it cost 1% more misses and brought no
// more rows an I/O.)
//
// A batch goes through lookup (per feature) -> reserve -> commit, or rollback. Not thread-safe: SlotPool locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absent_rows.h"
#include "eviction_order.h"
#include "lazy_array.h"
#include "row_set.h"
#include "slot_state.h"

namespace mtrains {

class SlotDirectory {
 public:
  SlotDirectory(int64_t rows, int32_t pool_rows);

  int64_t rows() const { return static_cast<int64_t>(slot_of_row_.size()); }
  int32_t pool_rows() const { return static_cast<int32_t>(row_of_slot_.size()); }
  bool whole() const { return slot_of_row_.size() == row_of_slot_.size(); }  // a slot for every row

  // Turns ids[begin, end) of a batch into slots[begin, end). Misses are collected: their slots are -(k + 1) until commit().
  // ids must be in range. `announced`: the batch's bit in windows, or 0. `slots`: null where nobody asks, of a pool with a slot for
  // every row. Returns the number of distinct rows that this call saw first for this stamp, misses left out.
  template <class Index>
  int64_t lookup(const Index* ids, int64_t begin, int64_t end, Stamp stamp, uint64_t announced, int64_t* slots);

  // A batch with this bit will use ids[begin, end); or will not after all.
  template <class Index>
  void announce(const Index* ids, int64_t begin, int64_t end, uint64_t bit);
  template <class Index>
  void withdraw(const Index* ids, int64_t begin, int64_t end, uint64_t bit);
  void set_first_announced(uint64_t batch) { first_announced_ = batch; }  // that has not begun; its bit is batch % 64
  const RowSet& wanted() const { return wanted_; }
  bool awaits_absent_rows() const { return absent_.count() > 0; }
  bool wants(int64_t row) const { return wanted_.contains(row); }

  std::span<const int64_t> missed_rows() const { return missed_rows_; }

  // Finds a slot for every missed row: free ones, then victims that no batch in [oldest_outstanding, ...] uses.
  // With `pinned` (one flag a slot) that exact answer replaces the stamps. False when there is no room: nothing changed.
  bool reserve(uint32_t oldest_outstanding_batch, Stamp stamp, const std::vector<uint8_t>* pinned);
  // Instead of a lookup and reserve: `rows` are wanted and could come now. Those for which there is a free slot, or a victim used
  // later than they are, become missed rows with a reserved slot.
  void reserve_for_wanted(std::span<const int64_t> rows, uint32_t oldest_outstanding_batch);
  std::span<const int32_t> reserved_slots() const { return reserved_; }
  int64_t row_of_slot(int32_t slot) const { return row_of_slot_[slot]; }
  bool dirty(int32_t slot) const { return order_.state(slot).dirty(); }
  uint32_t pace(int32_t slot) const { return order_.state(slot).pace(); }

  // Gives the reserved slots to the missed rows, and patches the positions that lookup left open.
  void commit(Stamp stamp, int64_t* slots);
  void rollback();

  int32_t slot_of_row(int64_t row) const { return slot_of_row_[row] > 0 ? slot_of_row_[row] - 1 : -1; }  // -1: not resident
  void prefetch(int64_t row) const { __builtin_prefetch(&slot_of_row_[static_cast<size_t>(row)]); }
  void touch(int32_t slot, uint32_t batch) { order_.state(slot).set_batch(batch); }
  void mark_dirty(int32_t slot) { order_.state(slot).stamp |= Stamp::kDirty; }
  void mark_clean(int32_t slot) { order_.state(slot).stamp &= ~Stamp::kDirty; }
  uint32_t batch_of_slot(int32_t slot) const { return order_.state(slot).batch(); }
  void drop(int32_t slot);  // the row leaves without being written: its fill failed
  void age(uint32_t batches);  // subtract from every stamp, so that batch numbers never run out
  void sort_by_use(std::span<int32_t> slots) const;  // into the order of their last use
  std::vector<int32_t> by_age() const;  // occupied slots, the one used last at the end, at the grain of 1/1024 of the ages there are
  int32_t resident() const { return pool_rows() - static_cast<int32_t>(free_count_); }
  int64_t evictions() const { return evictions_; }
  void check() const;  // tests: throws std::logic_error at a broken invariant

 private:
  struct Missed {
    int64_t position;  // in the batch
    int32_t miss;      // k: the k-th missed row
  };

  template <bool kWhole, class Index>
  int64_t lookup_in(const Index* ids, int64_t begin, int64_t end, Stamp stamp, uint64_t announced, int64_t* slots);
  void miss(int64_t row);
  int32_t absent_entry(int64_t row);        // of a row that is not here; makes one
  void forget_absent(int64_t row, int32_t at);  // nothing is awaited of it any more
  void leave(int32_t slot);                // the row is not here any more
  void take_free(std::span<const int64_t> rows);  // of rows that are not here, those for which there is a slot
  void sort_victims();
  // What stays known of a row that leaves the slot; and of one that comes, from its entry: its state, but for the window. It is `used` by
  // the stamp's batch, or has come before that.
  int32_t remembered(int32_t slot) const;
  uint64_t state_of(int32_t entry, Stamp stamp, bool used);

  static constexpr uint32_t kAbsentBit = 1u << 31, kRememberedBit = 1u << 30, kPlace = kRememberedBit - 1;
  static constexpr int kPaceBits = 6;
  static constexpr uint32_t kLastUse = kPlace >> kPaceBits;  // 24 bits of a batch's number
  static bool is_remembered(int32_t entry) { return entry < 0 && (static_cast<uint32_t>(entry) & kRememberedBit); }
  static bool is_absent(int32_t entry) { return entry < 0 && !(static_cast<uint32_t>(entry) & kRememberedBit); }
  static int32_t place(int32_t entry) { return static_cast<int32_t>(static_cast<uint32_t>(entry) & kPlace); }

  LazyArray<int32_t> slot_of_row_;
  std::vector<int32_t> row_of_slot_;
  EvictionOrder order_;
  AbsentRows absent_;
  RowSet wanted_;
  std::vector<int32_t> free_;  // none of a pool with a slot for every row: a row's own is free
  size_t free_count_;
  std::vector<int64_t> missed_rows_;
  std::vector<Missed> missed_;
  std::vector<int32_t> reserved_;
  std::vector<int32_t> settled_;  // slots whose last announced use this lookup is
  size_t reserved_free_ = 0;  // the first of reserved_ were free
  bool for_wanted_ = false;  // the rows reserved for are not those of a batch
  uint32_t renumbered_ = 0;  // what was subtracted from batches' numbers so far
  uint64_t first_announced_ = 0;
  int64_t evictions_ = 0;
};

}  // namespace mtrains
