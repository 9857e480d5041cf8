// SlotQueue: slots in the order in which they came, that may leave from anywhere.
//
//   entries_       the slots, the oldest first, at consecutive numbers from first_ on; -1 where one has left from between.
//   places[slot]   the number of its entry. Shared by the queues that a slot may be in: it is in one at a time.
//
// Who takes slots off the old end reads entries one after another, so those to come are known well before their turn (peek).
//
// Invariants: an entry s >= 0 at number n has places[s] == n; holes_ entries are -1, never more than a quarter of the slots and a few.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

namespace mtrains {

class SlotQueue {
 public:
  explicit SlotQueue(uint32_t* places) : places_(places) {}  // one a slot

  size_t size() const { return entries_.size() - holes_; }
  size_t holes() const { return holes_; }

  void push_newest(int32_t slot) {
    places_[static_cast<size_t>(slot)] = first_ + static_cast<uint32_t>(entries_.size());
    entries_.push_back(slot);
  }

  void push_oldest(int32_t slot) {
    places_[static_cast<size_t>(slot)] = --first_;
    entries_.push_front(slot);
  }

  // The oldest slot; there is one.
  int32_t oldest() {
    while (entries_.front() < 0) {
      pop_front();
      --holes_;
    }
    return entries_.front();
  }
  // Takes it off.
  int32_t pop_oldest() {
    const int32_t slot = oldest();
    pop_front();
    return slot;
  }

  // The slot whose turn is in so many pops, or -1: there is none, or a hole.
  int32_t peek(size_t ahead) const { return ahead < entries_.size() ? entries_[ahead] : -1; }

  void remove(int32_t slot) {
    entries_[places_[static_cast<size_t>(slot)] - first_] = -1;
    if (++holes_ > kHoles + size() / 4) close_holes();
  }

  // Calls visit(slot, whether its place is right), the oldest first.
  template <class Visit>
  void each(Visit&& visit) const {
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i] >= 0) visit(entries_[i], places_[static_cast<size_t>(entries_[i])] == first_ + static_cast<uint32_t>(i));
    }
  }

 private:
  static constexpr size_t kHoles = 64;  // a guess: fewer are not worth a pass

  void pop_front() {
    entries_.pop_front();
    ++first_;
  }

  void close_holes() {
    size_t kept = 0;
    for (const int32_t slot : entries_) {
      if (slot < 0) continue;
      places_[static_cast<size_t>(slot)] = first_ + static_cast<uint32_t>(kept);
      entries_[kept++] = slot;
    }
    entries_.resize(kept);
    holes_ = 0;
  }

  uint32_t* places_;
  std::deque<int32_t> entries_;
  uint32_t first_ = 0;  // numbers wrap; there are never as many entries
  size_t holes_ = 0;
};

}  // namespace mtrains
