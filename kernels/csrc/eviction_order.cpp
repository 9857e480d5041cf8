#include "eviction_order.h"

#include <algorithm>
#include <stdexcept>

namespace mtrains {

namespace {
constexpr uint64_t kUsesToStay = 1;  // in small, to go to main
}  // namespace

EvictionOrder::EvictionOrder(int32_t slots)
    : states_(static_cast<size_t>(slots)), links_(static_cast<size_t>(slots)), small_target_(slots / 10) {}

void EvictionOrder::push_newest(int32_t slot) {
  SlotState& s = state(slot);
  List& list = list_of(s);
  links_[slot] = {-1, list.newest};
  if (list.newest >= 0) links_[list.newest].newer = slot;
  list.newest = slot;
  if (list.oldest < 0) list.oldest = slot;
  ++list.size;
  s.stamp |= Stamp::kLinked;
}

void EvictionOrder::push_oldest(int32_t slot) {
  SlotState& s = state(slot);
  List& list = list_of(s);
  links_[slot] = {list.oldest, -1};
  if (list.oldest >= 0) links_[list.oldest].older = slot;
  list.oldest = slot;
  if (list.newest < 0) list.newest = slot;
  ++list.size;
  s.stamp |= Stamp::kLinked;
}

void EvictionOrder::unlink(int32_t slot) {
  SlotState& s = state(slot);
  List& list = list_of(s);
  const Links l = links_[slot];
  (l.newer >= 0 ? links_[l.newer].older : list.newest) = l.older;
  (l.older >= 0 ? links_[l.older].newer : list.oldest) = l.newer;
  --list.size;
  s.stamp &= ~Stamp::kLinked;
}

void EvictionOrder::enter(int32_t slot, bool seen_lately) {
  if (seen_lately) state(slot).stamp |= Stamp::kMain;
  if (!state(slot).awaited()) push_newest(slot);
}

void EvictionOrder::leave(int32_t slot) {
  if (state(slot).linked()) unlink(slot);
}

void EvictionOrder::put_back(int32_t slot) {
  if (!state(slot).awaited()) push_oldest(slot);
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
  pinned_in_small_ = 0;
  looks_in_main_ = 4 * (int64_t{small_.size} + main_.size);  // a row goes round at most three times before it leaves
}

int32_t EvictionOrder::next(uint32_t limit_batch, uint64_t first_announced, uint64_t until) {
  const int32_t slot = next_in_lists(limit_batch);
  return slot >= 0 ? slot : next_awaited(limit_batch, first_announced, until);
}

int32_t EvictionOrder::next_in_lists(uint32_t limit_batch) {
  while (true) {
    const bool small_has = pinned_in_small_ < small_.size, main_has = main_.size > 0 && looks_in_main_ > 0;
    if (!small_has && !main_has) return -1;
    const bool from_small = small_has && (small_.size > small_target_ || !main_has);
    const int32_t slot = (from_small ? small_ : main_).oldest;
    SlotState& s = state(slot);
    unlink(slot);
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
  candidates_.clear();
  std::array<size_t, 64> histogram{};
  const auto slots = static_cast<int32_t>(states_.size());
  const auto distance = [&](const SlotState& s) { return next_use(s.window, first_announced) - first_announced; };
  for (int32_t slot = 0; slot < slots; ++slot) {
    const SlotState& s = state(slot);
    if (s.awaited() && s.batch() < limit_batch) ++histogram[distance(s)];
  }
  const size_t enough = std::max(wanted_, states_.size() / 32);
  uint64_t nearest = 64;
  for (size_t seen = 0; nearest > 0 && seen < enough;) seen += histogram[--nearest];
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
  while (true) {
    if (candidates_.empty()) {
      if (collected_) return -1;
      collected_ = true;
      collect(limit_batch, first_announced);
      if (candidates_.empty()) return -1;
    }
    const Candidate c = candidates_.back();
    SlotState& s = state(c.slot);
    const bool stands = s.awaited() && s.batch() < limit_batch && next_use(s.window, first_announced) >= c.use;
    if (stands && c.use <= until) return -1;
    candidates_.pop_back();
    if (!stands) continue;
    leave(c.slot);
    s.set_batch(limit_batch);  // so that it is not collected again
    return c.slot;
  }
}

void EvictionOrder::check(int32_t occupied) const {
  auto fail = [](const char* what) { throw std::logic_error(what); };
  int32_t seen = 0;
  for (const List* list : {&small_, &main_}) {
    int32_t size = 0, newer = -1;
    for (int32_t slot = list->newest; slot >= 0; newer = slot, slot = links_[slot].older, ++size) {
      if (!state(slot).linked()) fail("eviction order: a slot in a list is not marked as linked");
      if (state(slot).main() != (list == &main_)) fail("eviction order: a slot is in the other list");
      if (links_[slot].newer != newer) fail("eviction order: links do not point back");
      if (size > list->size) fail("eviction order: a list is longer than it says");
    }
    if (newer != list->oldest || size != list->size) fail("eviction order: a list is not as long as it says");
    seen += size;
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
