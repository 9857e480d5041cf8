#include "eviction_order.h"

#include <algorithm>
#include <stdexcept>

namespace mtrains {

namespace {
constexpr uint64_t kUsesToStay = 1;  // in small, to go to main
constexpr size_t kAhead = 16;        // pops between the prefetch of a slot's state and its turn; a guess
}  // namespace

EvictionOrder::EvictionOrder(int32_t slots)
    : states_(static_cast<size_t>(slots)), places_(static_cast<size_t>(slots)), small_target_(static_cast<size_t>(slots) / 10) {}

void EvictionOrder::push_newest(int32_t slot) {
  SlotState& s = state(slot);
  list_of(s).push_newest(slot);
  s.stamp |= Stamp::kLinked;
}

void EvictionOrder::enter(int32_t slot, bool seen_lately) {
  if (seen_lately) state(slot).stamp |= Stamp::kMain;
  if (!state(slot).awaited()) push_newest(slot);
}

void EvictionOrder::leave(int32_t slot) {
  SlotState& s = state(slot);
  if (!s.linked()) return;
  list_of(s).remove(slot);
  s.stamp &= ~Stamp::kLinked;
}

void EvictionOrder::put_back(int32_t slot) {
  SlotState& s = state(slot);
  if (s.awaited()) return;
  list_of(s).push_oldest(slot);
  s.stamp |= Stamp::kLinked;
}

void EvictionOrder::settle(int32_t slot) {
  SlotState& s = state(slot);
  if (s.linked() || s.awaited()) return;
  if (s.uses() >= kUsesToStay) s.stamp |= Stamp::kMain;
  push_newest(slot);
}

void EvictionOrder::begin_round(size_t wanted) {
  wanted_ = wanted;
  collected_ = false;
  candidates_.clear();
  pinned_in_small_ = 0;
  looks_in_main_ = 4 * static_cast<int64_t>(small_.size() + main_.size());  // no row stays for more than two rounds
}

int32_t EvictionOrder::next(uint32_t limit_batch, uint64_t first_announced, uint64_t until) {
  const int32_t slot = next_in_lists(limit_batch);
  return slot >= 0 ? slot : next_awaited(limit_batch, first_announced, until);
}

int32_t EvictionOrder::next_in_lists(uint32_t limit_batch) {
  while (true) {
    const bool small_has = pinned_in_small_ < small_.size(), main_has = main_.size() > 0 && looks_in_main_ > 0;
    if (!small_has && !main_has) return -1;
    const bool from_small = small_has && (small_.size() > small_target_ || !main_has);
    SlotQueue& list = from_small ? small_ : main_;
    if (const int32_t ahead = list.peek(kAhead); ahead >= 0) __builtin_prefetch(&state(ahead), 1);
    const int32_t slot = list.pop_oldest();
    SlotState& s = state(slot);
    s.stamp &= ~Stamp::kLinked;
    if (!from_small) --looks_in_main_;
    if (s.awaited()) continue;
    if (s.batch() >= limit_batch) {
      pinned_in_small_ += from_small;
      push_newest(slot);
    } else if (from_small ? s.uses() >= kUsesToStay : s.uses() > 0) {
      s.stamp -= from_small ? s.stamp & Stamp::kUses : Stamp::kOneUse;
      s.stamp |= Stamp::kMain;
      push_newest(slot);
    } else {
      return slot;
    }
  }
}

void EvictionOrder::collect(uint32_t limit_batch, uint64_t first_announced) {
  std::array<size_t, 64> histogram{};
  const auto slots = static_cast<int32_t>(states_.size());
  const auto distance = [&](const SlotState& s) { return next_use(s.window, first_announced) - first_announced; };
  for (int32_t slot = 0; slot < slots; ++slot) {
    const SlotState& s = state(slot);
    if (s.awaited() && s.batch() < limit_batch) ++histogram[distance(s)];
  }
  uint64_t nearest = 64;
  for (size_t seen = 0; nearest > 0 && seen < wanted_;) seen += histogram[--nearest];
  for (int32_t slot = 0; slot < slots; ++slot) {
    const SlotState& s = state(slot);
    if (s.awaited() && s.batch() < limit_batch && distance(s) >= nearest) {
      candidates_.push_back({next_use(s.window, first_announced), Stamp{s.stamp}.order(), slot, s.dirty()});
    }
  }
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    if (a.use != b.use) return a.use < b.use;
    if (a.dirty != b.dirty) return a.dirty;
    return a.order != b.order ? a.order > b.order : a.slot > b.slot;
  });
}

int32_t EvictionOrder::next_awaited(uint32_t limit_batch, uint64_t first_announced, uint64_t until) {
  if (!collected_) collect(limit_batch, first_announced);
  collected_ = true;
  if (candidates_.empty() || candidates_.back().use <= until) return -1;
  const int32_t slot = candidates_.back().slot;
  candidates_.pop_back();
  leave(slot);
  return slot;
}

void EvictionOrder::check(int32_t occupied) const {
  auto fail = [](const char* what) { throw std::logic_error(what); };
  int32_t seen = 0;
  for (const SlotQueue* list : {&small_, &main_}) {
    size_t size = 0;
    list->each([&](int32_t slot, bool in_place) {
      if (!state(slot).linked()) fail("eviction order: a slot in a list is not marked as linked");
      if (state(slot).main() != (list == &main_)) fail("eviction order: a slot is in the other list");
      if (!in_place) fail("eviction order: a slot is not where its place says");
      ++size;
    });
    if (size != list->size()) fail("eviction order: a list is not as long as it says");
    seen += static_cast<int32_t>(size);
  }
  int32_t linked = 0, settled = 0, awaited = 0;
  for (size_t i = 0; i < states_.size(); ++i) {
    const SlotState& s = states_[i];
    linked += s.linked();
    settled += s.linked() && !s.awaited();
    awaited += s.awaited();
  }
  if (linked != seen) fail("eviction order: a slot is marked as linked and in no list");
  if (settled + awaited != occupied) fail("eviction order: an occupied slot is neither awaited nor in a list");
}

}  // namespace mtrains
