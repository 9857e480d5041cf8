#include "slot_directory.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace mtrains {

namespace {
// Ids between the prefetch of a row's map entry, that of its slot's state (which needs the map entry), and their use.
// Measured on an AMD EPYC with benchmarks/hit_path.py, 2026-11-24, ns an id: 48/16 8.2, 64/32 7.0, 96/32 6.0, 64/48 9.5,
// 128/64 5.3, 192/96 5.0, 256/128 4.4. The distance between the two matters as much as the distance to the use.
constexpr int64_t kMapAhead = 192;
constexpr int64_t kStateAhead = 96;
constexpr size_t kLeaveAhead = 16;  // victims between the prefetch of a row's map entry and its change; a guess
}  // namespace

SlotDirectory::SlotDirectory(int64_t rows, int32_t pool_rows)
    : slot_of_row_(static_cast<size_t>(rows)), row_of_slot_(pool_rows, -1), order_(pool_rows), wanted_(rows),
      free_(whole() ? 0 : pool_rows), free_count_(pool_rows) {
  if (rows > INT32_MAX - 1) {
    throw Error(ErrorKind::kConfiguration, "a slot pool or cache serves tables of at most " + std::to_string(INT32_MAX - 1) +
                                               " rows, got " + std::to_string(rows) + "; shard the table by rows");
  }
  for (size_t k = 0; k < free_.size(); ++k) free_[k] = pool_rows - 1 - static_cast<int32_t>(k);
}

template <class Index>
int64_t SlotDirectory::lookup(const Index* ids, int64_t begin, int64_t end, Stamp stamp, uint64_t announced, int64_t* slots) {
  return whole() ? lookup_in<true>(ids, begin, end, stamp, announced, slots) : lookup_in<false>(ids, begin, end, stamp, announced, slots);
}

template <bool kWhole, class Index>
int64_t SlotDirectory::lookup_in(const Index* ids, int64_t begin, int64_t end, Stamp stamp, uint64_t announced, int64_t* slots) {
  int32_t* const map = slot_of_row_.data();
  SlotState* const states = order_.states();
  const uint32_t batch = stamp.batch();
  ReuseRates& rates = order_.rates();
  if constexpr (!kWhole) rates.advance_to(batch);  // nothing is ever evicted from the other
  int64_t first_seen = 0;
  for (int64_t i = begin; i < end; ++i) {
    if constexpr (kWhole) {
      if (i + kStateAhead < end) __builtin_prefetch(&states[ids[i + kStateAhead]], 1);
    } else {
      if (i + kMapAhead < end) __builtin_prefetch(&map[ids[i + kMapAhead]]);
      if (i + kStateAhead < end) {
        const int32_t ahead = map[ids[i + kStateAhead]];
        __builtin_prefetch(&states[ahead > 0 ? ahead - 1 : 0], 1);
      }
    }
    int32_t slot = -1;
    if constexpr (kWhole) {
      const SlotState& s = states[ids[i]];
      if (s.stamp | s.window) [[likely]] slot = static_cast<int32_t>(ids[i]);
    } else {
      slot = map[ids[i]] > 0 ? map[ids[i]] - 1 : -1;
    }
    if (slot >= 0) [[likely]] {
      SlotState& s = states[slot];
      const uint64_t old = s.stamp;
      const bool first = Stamp{old}.batch() != batch;
      s.stamp = stamp.at(i).value | (old & Stamp::kFlags);
      if constexpr (!kWhole) {
        if (first) {
          const uint32_t pace = rates.used(s.pace(), batch - Stamp{old}.batch());
          s.stamp = (s.stamp & ~Stamp::kPace) | uint64_t{pace} << Stamp::kPaceShift | Stamp::kUsed;
        }
      }
      first_seen += first;
      if (!kWhole || slots) slots[i] = slot;
      if (s.window & announced) {
        s.window &= ~announced;
        if (!s.window) settled_.push_back(slot);
      }
      continue;
    }
    const int32_t entry = map[ids[i]];
    if (!is_absent(entry) || absent_[place(entry)].miss == 0) miss(static_cast<int64_t>(ids[i]));
    AbsentRow& row = absent_[place(map[ids[i]])];
    row.window &= ~announced;
    if (!kWhole || slots) slots[i] = -row.miss;
    missed_.push_back({i, row.miss - 1});
  }
  for (const int32_t slot : settled_) order_.settle(slot);
  settled_.clear();
  return first_seen;
}

template int64_t SlotDirectory::lookup<int32_t>(const int32_t*, int64_t, int64_t, Stamp, uint64_t, int64_t*);
template int64_t SlotDirectory::lookup<int64_t>(const int64_t*, int64_t, int64_t, Stamp, uint64_t, int64_t*);

void SlotDirectory::miss(int64_t row) {
  missed_rows_.push_back(row);
  absent_[absent_entry(row)].miss = static_cast<int32_t>(missed_rows_.size());
}

int32_t SlotDirectory::absent_entry(int64_t row) {
  int32_t& entry = slot_of_row_[static_cast<size_t>(row)];
  if (!is_absent(entry)) entry = static_cast<int32_t>(kAbsentBit | static_cast<uint32_t>(absent_.add(0, entry)));
  return place(entry);
}

void SlotDirectory::forget_absent(int64_t row, int32_t at) {
  slot_of_row_[static_cast<size_t>(row)] = absent_[at].entry;
  absent_.remove(at);
  if (wants(row)) wanted_.remove(row);
}

template <class Index>
void SlotDirectory::announce(const Index* ids, int64_t begin, int64_t end, uint64_t bit) {
  const int32_t* const map = slot_of_row_.data();
  SlotState* const states = order_.states();
  for (int64_t i = begin; i < end; ++i) {
    if (i + kMapAhead < end) __builtin_prefetch(&map[ids[i + kMapAhead]]);
    if (i + kStateAhead < end) {
      const int32_t ahead = map[ids[i + kStateAhead]];
      __builtin_prefetch(ahead > 0 ? static_cast<const void*>(&states[ahead - 1]) : absent_.data() + place(ahead), 1);
    }
    const int32_t entry = map[ids[i]];
    if (entry > 0) [[likely]] {
      states[entry - 1].window |= bit;
    } else if (is_absent(entry)) {
      absent_[place(entry)].window |= bit;
    } else {
      absent_[absent_entry(static_cast<int64_t>(ids[i]))].window = bit;
      wanted_.add(static_cast<int64_t>(ids[i]));
    }
  }
}

template void SlotDirectory::announce<int32_t>(const int32_t*, int64_t, int64_t, uint64_t);
template void SlotDirectory::announce<int64_t>(const int64_t*, int64_t, int64_t, uint64_t);

template <class Index>
void SlotDirectory::withdraw(const Index* ids, int64_t begin, int64_t end, uint64_t bit) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t entry = slot_of_row_[static_cast<size_t>(ids[i])];
    if (entry > 0) {
      SlotState& s = order_.state(entry - 1);
      if (!(s.window & bit)) continue;
      s.window &= ~bit;
      order_.settle(entry - 1);
    } else if (is_absent(entry)) {
      AbsentRow& row = absent_[place(entry)];
      row.window &= ~bit;
      if (!row.window) forget_absent(static_cast<int64_t>(ids[i]), place(entry));
    }
  }
}

template void SlotDirectory::withdraw<int32_t>(const int32_t*, int64_t, int64_t, uint64_t);
template void SlotDirectory::withdraw<int64_t>(const int64_t*, int64_t, int64_t, uint64_t);

void SlotDirectory::take_free(std::span<const int64_t> rows) {
  reserved_free_ = std::min(rows.size(), free_count_);
  if (whole()) {
    reserved_.assign(rows.begin(), rows.end());
  } else {
    reserved_.assign(free_.rbegin(), free_.rbegin() + static_cast<std::ptrdiff_t>(reserved_free_));
  }
}

bool SlotDirectory::reserve(uint32_t oldest_outstanding_batch, Stamp stamp, const std::vector<uint8_t>* pinned) {
  const size_t needed = missed_rows_.size();
  take_free(missed_rows_);
  if (reserved_.size() == needed) return true;
  if (pinned) {  // rare: the stamps were too conservative
    for (const bool awaited : {false, true}) {
      for (int32_t s = 0; s < pool_rows() && reserved_.size() < needed; ++s) {
        if (row_of_slot_[s] >= 0 && !(*pinned)[s] && order_.state(s).awaited() == awaited) reserved_.push_back(s);
      }
    }
    if (reserved_.size() == needed) {
      for (size_t k = reserved_free_; k < needed; ++k) order_.leave(reserved_[k]);
      return true;
    }
    reserved_.clear();
    return false;
  }
  const uint32_t limit = std::min(oldest_outstanding_batch, stamp.batch());
  order_.begin_round(needed);
  while (reserved_.size() < needed) {
    const int32_t slot = order_.next(limit, first_announced_, 0);
    if (slot < 0) {
      for (size_t k = reserved_free_; k < reserved_.size(); ++k) order_.put_back(reserved_[k]);
      reserved_.clear();
      return false;
    }
    reserved_.push_back(slot);
  }
  sort_victims();
  return true;
}

void SlotDirectory::reserve_for_wanted(std::span<const int64_t> rows, uint32_t oldest_outstanding_batch) {
  struct Wanted {
    uint64_t use;
    int64_t row;
  };
  std::vector<Wanted> soonest;
  for (const int64_t row : rows) {
    if (wants(row)) soonest.push_back({next_use(absent_[place(slot_of_row_[row])].window, first_announced_), row});
  }
  for_wanted_ = true;
  std::sort(soonest.begin(), soonest.end(), [](const Wanted& a, const Wanted& b) { return a.use != b.use ? a.use < b.use : a.row < b.row; });
  std::vector<int64_t> those;
  for (const Wanted& w : soonest) those.push_back(w.row);
  take_free(those);
  order_.begin_round(soonest.size());
  for (size_t k = 0; k < soonest.size(); ++k) {
    if (k == reserved_.size()) {
      const int32_t slot = order_.next(oldest_outstanding_batch, first_announced_, soonest[k].use);
      if (slot < 0) break;
      reserved_.push_back(slot);
    }
    miss(soonest[k].row);
  }
  sort_victims();
}

void SlotDirectory::sort_victims() { sort_by_use(std::span(reserved_).subspan(reserved_free_)); }

int32_t SlotDirectory::remembered(int32_t slot) const {
  const SlotState& s = order_.state(slot);
  const uint32_t last_use = (s.batch() + renumbered_) & kLastUse;
  return static_cast<int32_t>(kAbsentBit | kRememberedBit | last_use << kPaceBits | s.pace());
}

uint64_t SlotDirectory::state_of(int32_t entry, Stamp stamp, bool used) {
  const uint32_t known = static_cast<uint32_t>(entry) & kPlace;
  uint32_t pace = is_remembered(entry) ? known & ((1u << kPaceBits) - 1) : ReuseRates::kUnused;
  const uint32_t age = pace == ReuseRates::kUnused ? 0 : (stamp.batch() + renumbered_ - (known >> kPaceBits)) & kLastUse;
  if (used) {
    pace = order_.rates().used(pace, age);
  } else {
    stamp = Stamp::of(stamp.batch() - std::min(age, stamp.batch()), stamp.value & Stamp::kDirty);
  }
  return stamp.value | uint64_t{pace} << Stamp::kPaceShift;
}

void SlotDirectory::leave(int32_t slot) {
  const int64_t row = row_of_slot_[slot];
  const uint64_t window = order_.state(slot).window;
  slot_of_row_[row] = remembered(slot);
  if (window) {
    absent_[absent_entry(row)].window = window;
    wanted_.add(row);
  }
}

void SlotDirectory::commit(Stamp stamp, int64_t* slots) {
  free_count_ -= reserved_free_;
  if (!whole()) free_.resize(free_count_);
  evictions_ += static_cast<int64_t>(reserved_.size() - reserved_free_);
  for (size_t k = 0; k < missed_rows_.size(); ++k) {
    if (k + kLeaveAhead < reserved_.size()) {
      if (const int64_t leaves = row_of_slot_[reserved_[k + kLeaveAhead]]; leaves >= 0) __builtin_prefetch(&slot_of_row_[leaves], 1);
    }
    const int32_t slot = reserved_[k];
    const int64_t row = missed_rows_[k];
    const AbsentRow absent = absent_[place(slot_of_row_[row])];
    if (row_of_slot_[slot] >= 0) leave(slot);
    forget_absent(row, place(slot_of_row_[row]));
    row_of_slot_[slot] = static_cast<int32_t>(row);
    slot_of_row_[row] = slot + 1;
    order_.state(slot) = {state_of(absent.entry, stamp, !for_wanted_), absent.window};
  }
  for (const Missed& m : missed_) {
    const int32_t slot = reserved_[static_cast<size_t>(m.miss)];
    if (slots) slots[m.position] = slot;
    uint64_t& state = order_.state(slot).stamp;
    state = stamp.at(m.position).value | (state & Stamp::kFlags);
  }
  for (const int32_t slot : reserved_) order_.enter(slot);
  for_wanted_ = false;
  missed_rows_.clear();
  missed_.clear();
  reserved_.clear();
  reserved_free_ = 0;
}

void SlotDirectory::rollback() {
  for (size_t k = reserved_free_; k < reserved_.size(); ++k) order_.put_back(reserved_[k]);
  for_wanted_ = false;
  for (const int64_t row : missed_rows_) {
    const int32_t at = place(slot_of_row_[row]);
    absent_[at].miss = 0;
    if (!absent_[at].window) forget_absent(row, at);
  }
  missed_rows_.clear();
  missed_.clear();
  reserved_.clear();
  reserved_free_ = 0;
}

void SlotDirectory::drop(int32_t slot) {
  leave(slot);
  order_.leave(slot);
  order_.state(slot) = {0, 0};
  row_of_slot_[slot] = -1;
  if (!whole()) free_.push_back(slot);
  ++free_count_;
}

void SlotDirectory::age(uint32_t batches) {
  renumbered_ += batches;
  order_.rates().renumber(batches);
  for (int32_t s = 0; s < pool_rows(); ++s) touch(s, batch_of_slot(s) > batches ? batch_of_slot(s) - batches : 0);
}

void SlotDirectory::sort_by_use(std::span<int32_t> slots) const {
  std::sort(slots.begin(), slots.end(), [this](int32_t a, int32_t b) {
    const uint64_t of_a = Stamp{order_.state(a).stamp}.order(), of_b = Stamp{order_.state(b).stamp}.order();
    return of_a != of_b ? of_a < of_b : a < b;
  });
}

std::vector<int32_t> SlotDirectory::by_age() const {
  constexpr uint64_t kBuckets = 1024;
  uint32_t oldest = UINT32_MAX, newest = 0;
  for (int32_t s = 0; s < pool_rows(); ++s) {
    if (row_of_slot_[s] < 0) continue;
    oldest = std::min(oldest, batch_of_slot(s));
    newest = std::max(newest, batch_of_slot(s));
  }
  const uint64_t width = oldest > newest ? 1 : (newest - oldest) / kBuckets + 1;
  std::array<size_t, kBuckets + 1> begin{};
  for (int32_t s = 0; s < pool_rows(); ++s) {
    if (row_of_slot_[s] >= 0) ++begin[(batch_of_slot(s) - oldest) / width + 1];
  }
  for (size_t b = 1; b < begin.size(); ++b) begin[b] += begin[b - 1];
  std::vector<int32_t> slots(begin.back());
  for (int32_t s = 0; s < pool_rows(); ++s) {
    if (row_of_slot_[s] >= 0) slots[begin[(batch_of_slot(s) - oldest) / width]++] = s;
  }
  return slots;
}

void SlotDirectory::check() const {
  auto fail = [](const char* what) { throw std::logic_error(what); };
  if (!missed_rows_.empty() || !reserved_.empty()) fail("slot directory: a batch is half looked up");
  size_t free_slots = 0, mapped = 0, absent = 0;
  for (int32_t s = 0; s < pool_rows(); ++s) {
    const int64_t row = row_of_slot_[s];
    if (row < 0) {
      ++free_slots;
      if (order_.state(s).stamp || order_.state(s).window) fail("slot directory: the state of a free slot is not zero");
    } else if (slot_of_row_[row] != s + 1) {
      fail("slot directory: a slot's row does not point back");
    } else if (!order_.state(s).stamp && !order_.state(s).window) {
      fail("slot directory: the state of a slot that is taken is zero");
    } else if (whole() && row != s) {
      fail("slot directory: a pool with a slot for every row has one elsewhere");
    }
  }
  if (free_slots != free_count_ || free_.size() != (whole() ? 0 : free_count_)) fail("slot directory: free list and free slots differ");
  for (size_t row = 0; row < slot_of_row_.size(); ++row) {
    const int32_t entry = slot_of_row_[row];
    mapped += entry > 0;
    absent += is_absent(entry);
    if (is_absent(entry) && absent_[place(entry)].miss) fail("slot directory: a miss was left");
    if (is_absent(entry) && !absent_[place(entry)].window) fail("slot directory: nothing is awaited of an absent row");
    if (wants(static_cast<int64_t>(row)) != is_absent(entry)) fail("slot directory: the rows wanted are not those absent and awaited");
  }
  if (mapped + free_slots != row_of_slot_.size()) fail("slot directory: rows and slots are not one to one");
  if (absent != absent_.count()) fail("slot directory: an absent row is known that no entry names");
  order_.check(resident());
}

}  // namespace mtrains
