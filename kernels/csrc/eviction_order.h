// EvictionOrder: which slots of a pool are given away first.
//
// Rows that an announced batch will use ("awaited") go last, the one whose next use is furthest away before the others. Of all
// others the one goes whose rate of use, by its pace and age, is the least (reuse_rates.h).
//
// Rows of like paces have a queue, in the order in which they came there; the oldest of each queue are compared. A row that was used since
// then goes to the end of the queue of its new pace when it is the oldest. So a hit touches no queue, and a queue has nearly the order of
// last uses.
//
// Queues know where a slot is (slot_queue.h). An awaited row stays where it is until the end of its queue meets
// it; then it is in none until its last announced use, and so nothing is met twice in vain. Where the queues give too little, one pass
// over the slots collects those awaited furthest away; of equals the clean ones first, since they leave without a write.
//
// Invariants: a slot is linked (in a queue) iff its state says so, in the one that its state says; free slots are in none; an
// occupied slot that is not awaited is in one, but for those just handed out by next().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "lazy_array.h"
#include "reuse_rates.h"
#include "slot_queue.h"
#include "slot_state.h"

namespace mtrains {

class EvictionOrder {
 public:
  explicit EvictionOrder(int32_t slots);

  SlotState* states() { return states_.data(); }
  const SlotState& state(int32_t slot) const { return states_[static_cast<size_t>(slot)]; }
  SlotState& state(int32_t slot) { return states_[static_cast<size_t>(slot)]; }
  ReuseRates& rates() { return rates_; }

  void enter(int32_t slot);     // a row came into the slot, its state is set
  void leave(int32_t slot);     // the slot is free or handed out: linked nowhere
  void put_back(int32_t slot);  // handed out in vain: it is the first to go
  void settle(int32_t slot);    // its last announced use has begun

  // Before a series of next() for rows that come now, with one limit.
  void begin_round(size_t wanted);
  // The slot to give away, among those last used before `limit_batch`; -1: there is none. `first_announced`: see next_use.
  // `until`: of awaited rows only those used after that batch. The slot is then in no queue.
  int32_t next(uint32_t limit_batch, uint64_t first_announced, uint64_t until);
  void check(int32_t occupied) const;  // tests: throws std::logic_error at a broken invariant

 private:
  struct Round {  // by queue
    uint32_t unknown = 0;  // bits of queues whose oldest is to be looked for
    std::array<uint64_t, ReuseRates::kClasses> oldest{};  // its rate of use, a float's bits, and the batch of its last use; kNone; 0 before a look
    std::array<size_t, ReuseRates::kClasses> unlooked{};  // slots that may be given away and have not been met
  };
  static constexpr uint64_t kNone = UINT64_MAX;
  struct Candidate {
    uint64_t use;
    uint64_t order;
    int32_t slot;
    bool dirty;
  };

  void push_newest(int32_t slot);
  int32_t next_in_queues(uint32_t limit_batch);
  uint64_t look(uint32_t queue, uint32_t limit_batch);  // what Round::oldest says of the queue
  int32_t next_awaited(uint32_t limit_batch, uint64_t first_announced, uint64_t until);
  void collect(uint32_t limit_batch, uint64_t first_announced);

  LazyArray<SlotState> states_;
  LazyArray<uint32_t> places_;  // by slot: where it is in its queue
  std::vector<SlotQueue> queues_;  // by class of pace
  ReuseRates rates_;
  Round round_;
  size_t wanted_ = 0;       // of this round
  bool collected_ = false;  // in this round
  std::vector<Candidate> candidates_;  // of this round, the first to go last
};

}  // namespace mtrains
