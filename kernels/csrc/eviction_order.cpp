#include "eviction_order.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace mtrains {

namespace {
constexpr size_t kAhead = 16;  // looks between the prefetch of a slot's state and its turn; a guess

uint32_t queue_of(const SlotState& s) { return std::min(ReuseRates::class_of(s.pace()), ReuseRates::kClasses - 1); }
}  // namespace

EvictionOrder::EvictionOrder(int32_t slots)
    : states_(static_cast<size_t>(slots)), places_(static_cast<size_t>(slots)), queues_(ReuseRates::kClasses, SlotQueue(places_.data())) {}

void EvictionOrder::push_newest(int32_t slot) {
  SlotState& s = state(slot);
  const uint32_t queue = queue_of(s);
  queues_[queue].push_newest(slot);
  s.set_queue(queue);
}

void EvictionOrder::enter(int32_t slot) {
  if (!state(slot).awaited()) push_newest(slot);
}

void EvictionOrder::leave(int32_t slot) {
  SlotState& s = state(slot);
  if (!s.linked()) return;
  queues_[s.queue()].remove(slot);
  s.unlink();
}

void EvictionOrder::put_back(int32_t slot) {
  SlotState& s = state(slot);
  if (s.awaited()) return;
  const uint32_t queue = queue_of(s);
  queues_[queue].push_oldest(slot);
  s.set_queue(queue);
}

void EvictionOrder::settle(int32_t slot) {
  const SlotState& s = state(slot);
  if (!s.linked() && !s.awaited()) push_newest(slot);
}

void EvictionOrder::begin_round(size_t wanted) {
  wanted_ = wanted;
  collected_ = false;
  candidates_.clear();
  round_.unknown = (1u << queues_.size()) - 1;
  round_.oldest.fill(0);
  for (size_t q = 0; q < queues_.size(); ++q) round_.unlooked[q] = queues_[q].size();
}

int32_t EvictionOrder::next(uint32_t limit_batch, uint64_t first_announced, uint64_t until) {
  const int32_t slot = next_in_queues(limit_batch);
  return slot >= 0 ? slot : next_awaited(limit_batch, first_announced, until);
}

int32_t EvictionOrder::next_in_queues(uint32_t limit_batch) {
  while (round_.unknown) {
    const auto queue = static_cast<uint32_t>(std::countr_zero(round_.unknown));
    round_.unknown ^= 1u << queue;
    round_.oldest[queue] = look(queue, limit_batch);
  }
  size_t least = 0;
  for (size_t q = 1; q < queues_.size(); ++q) least = round_.oldest[q] < round_.oldest[least] ? q : least;
  if (round_.oldest[least] == kNone) return -1;
  const int32_t slot = queues_[least].pop_oldest();
  state(slot).unlink();
  round_.unknown |= 1u << least;
  --round_.unlooked[least];
  return slot;
}

uint64_t EvictionOrder::look(uint32_t queue, uint32_t limit_batch) {
  SlotQueue& slots = queues_[queue];
  for (; round_.unlooked[queue] > 0; --round_.unlooked[queue]) {
    if (const int32_t ahead = slots.peek(kAhead); ahead >= 0) __builtin_prefetch(&state(ahead), 1);
    const int32_t slot = slots.oldest();
    SlotState& s = state(slot);
    const bool used = s.used();
    if (!s.awaited() && !used && s.batch() < limit_batch) {
      return uint64_t{std::bit_cast<uint32_t>(rates_.rate(queue, rates_.now() - s.batch()))} << 32 | s.batch();
    }
    slots.pop_oldest();
    s.unlink();
    if (s.awaited()) continue;
    push_newest(slot);
    if (!used) continue;  // an outstanding batch uses it
    ++round_.unlooked[s.queue()];
    if (round_.oldest[s.queue()] == kNone) round_.unknown |= 1u << s.queue();
  }
  return kNone;
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
  for (size_t q = 0; q < queues_.size(); ++q) {
    size_t size = 0;
    queues_[q].each([&](int32_t slot, bool in_place) {
      if (!state(slot).linked()) fail("eviction order: a slot in a queue is not marked as linked");
      if (state(slot).queue() != q) fail("eviction order: a slot is in another queue than it says");
      if (!in_place) fail("eviction order: a slot is not where its place says");
      ++size;
    });
    if (size != queues_[q].size()) fail("eviction order: a queue is not as long as it says");
    seen += static_cast<int32_t>(size);
  }
  int32_t linked = 0, settled = 0, awaited = 0;
  for (size_t i = 0; i < states_.size(); ++i) {
    const SlotState& s = states_[i];
    linked += s.linked();
    settled += s.linked() && !s.awaited();
    awaited += s.awaited();
  }
  if (linked != seen) fail("eviction order: a slot is marked as linked and in no queue");
  if (settled + awaited != occupied) fail("eviction order: an occupied slot is neither awaited nor in a queue");
}

}  // namespace mtrains
