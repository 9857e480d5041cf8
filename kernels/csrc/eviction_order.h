// EvictionOrder: which slots of a pool are given away first.
//
// Rows that an announced batch will use ("awaited") go last, the one whose next use is furthest away before the others. All
// others go by S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023):
//
//   small   FIFO of rows that came for the first time in a while. At its end, those used again since go to main, others leave.
//   main    FIFO of the rest. At its end, a row used since loses one use and goes round again; one without uses leaves.
//   Small is drawn on while it holds more than a tenth of the pool. Rows that left it lately, which the owner remembers
//   (slot_directory.h), go to main when they come back.
//
// Both are queues of slots (slot_queue.h), which know where a slot is. An awaited row stays where it is until the end of its list meets
// it; then it is in no list until its last announced use, and so nothing is met twice in vain. Where the lists give too little, one pass
// over the slots collects those awaited furthest away; of equals the clean ones first, since they leave without a write.
//
// Invariants: a slot is linked (in a list) iff its state says so, in main iff its state says so; free slots are in none; an
// occupied slot that is not awaited is in one, but for those just handed out by next().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "lazy_array.h"
#include "slot_queue.h"
#include "slot_state.h"

namespace mtrains {

class EvictionOrder {
 public:
  explicit EvictionOrder(int32_t slots);

  SlotState* states() { return states_.data(); }
  const SlotState& state(int32_t slot) const { return states_[static_cast<size_t>(slot)]; }
  SlotState& state(int32_t slot) { return states_[static_cast<size_t>(slot)]; }

  // A row came into the slot, its state is set. `seen_lately`: it left small not long ago.
  void enter(int32_t slot, bool seen_lately);
  void leave(int32_t slot);      // the slot is free or handed out: linked nowhere
  void put_back(int32_t slot);   // handed out in vain: it is the first to go
  void settle(int32_t slot);     // its last announced use has begun

  // Before a series of next() for rows that come now.
  void begin_round(size_t wanted);
  // The slot to give away, among those last used before `limit_batch`; -1: there is none. `first_announced`: see next_use.
  // `until`: of awaited rows only those used after that batch. The slot is then in no list.
  int32_t next(uint32_t limit_batch, uint64_t first_announced, uint64_t until);
  void check(int32_t occupied) const;  // tests: throws std::logic_error at a broken invariant

 private:
  struct Candidate {
    uint64_t use;
    uint64_t order;
    int32_t slot;
    bool dirty;
  };

  SlotQueue& list_of(const SlotState& s) { return s.main() ? main_ : small_; }
  void push_newest(int32_t slot);
  int32_t next_in_lists(uint32_t limit_batch);
  int32_t next_awaited(uint32_t limit_batch, uint64_t first_announced, uint64_t until);
  void collect(uint32_t limit_batch, uint64_t first_announced);

  LazyArray<SlotState> states_;
  LazyArray<uint32_t> places_;  // by slot: where it is in its queue
  SlotQueue small_{places_.data()}, main_{places_.data()};
  const size_t small_target_;
  size_t pinned_in_small_ = 0;  // found in this round: they are at the newest end
  int64_t looks_in_main_ = 0;    // left in this round
  size_t wanted_ = 0;            // of this round
  bool collected_ = false;       // in this round
  std::vector<Candidate> candidates_;  // of this round, the first to go last
};

}  // namespace mtrains
