#include "slot_directory.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace mtrains {

namespace {
// Ids between the prefetch of a row's map entry, that of its slot's stamp (which needs the map entry), and their use.
// Measured on an AMD EPYC with benchmarks/hit_path.py, 2026-11-24, ns an id: 48/16 8.2, 64/32 7.0, 96/32 6.0, 64/48 9.5,
// 128/64 5.3, 192/96 5.0, 256/128 4.4. The distance between the two matters as much as the distance to the use.
constexpr int64_t kMapAhead = 192;
constexpr int64_t kStampAhead = 96;
}  // namespace

SlotDirectory::SlotDirectory(int64_t rows, int32_t pool_rows)
    : slot_of_row_(static_cast<size_t>(rows)), row_of_slot_(pool_rows, -1), stamp_(static_cast<size_t>(pool_rows)), free_(pool_rows) {
  if (rows > INT32_MAX - 1) {
    throw Error(ErrorKind::kConfiguration, "a slot pool or cache serves tables of at most " + std::to_string(INT32_MAX - 1) +
                                               " rows, got " + std::to_string(rows) + "; shard the table by rows");
  }
  for (int32_t s = 0; s < pool_rows; ++s) free_[s] = pool_rows - 1 - s;
}

template <class Index>
int64_t SlotDirectory::lookup(const Index* ids, int64_t begin, int64_t end, Stamp stamp, int64_t* slots) {
  int32_t* const map = slot_of_row_.data();
  uint64_t* const stamps = stamp_.data();
  const uint32_t batch = stamp.batch();
  int64_t first_seen = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kMapAhead < end) __builtin_prefetch(&map[ids[i + kMapAhead]]);
    if (i + kStampAhead < end) {
      const int32_t ahead = map[ids[i + kStampAhead]];
      __builtin_prefetch(&stamps[ahead > 0 ? ahead - 1 : 0], 1);
    }
    int32_t entry = map[ids[i]];
    if (entry > 0) [[likely]] {
      const uint64_t old = stamps[entry - 1];
      stamps[entry - 1] = stamp.at(i).as_dirty_as(old).value;
      first_seen += Stamp{old}.batch() != batch;
      slots[i] = entry - 1;
      continue;
    }
    if (entry == 0) {
      missed_rows_.push_back(static_cast<int64_t>(ids[i]));
      entry = -static_cast<int32_t>(missed_rows_.size());
      map[ids[i]] = entry;
    }
    slots[i] = entry;
    miss_positions_.push_back(i);
  }
  return first_seen;
}

template int64_t SlotDirectory::lookup<int32_t>(const int32_t*, int64_t, int64_t, Stamp, int64_t*);
template int64_t SlotDirectory::lookup<int64_t>(const int64_t*, int64_t, int64_t, Stamp, int64_t*);

void SlotDirectory::collect_candidates(uint32_t limit_batch, size_t wanted) {
  candidates_.clear();
  uint32_t oldest = UINT32_MAX;
  for (int32_t s = 0; s < pool_rows(); ++s) {
    if (row_of_slot_[s] >= 0) oldest = std::min(oldest, batch_of_slot(s));
  }
  if (oldest >= limit_batch) return;
  constexpr uint32_t kBuckets = 1024;
  const uint32_t width = (limit_batch - oldest) / kBuckets + 1;
  std::array<uint32_t, kBuckets> histogram{};
  for (int32_t s = 0; s < pool_rows(); ++s) {
    const uint32_t batch = batch_of_slot(s);
    if (batch < limit_batch && row_of_slot_[s] >= 0) ++histogram[(batch - oldest) / width];
  }
  uint32_t threshold = 0;
  for (size_t seen = 0; threshold < kBuckets && seen < wanted; ++threshold) seen += histogram[threshold];
  for (int32_t s = 0; s < pool_rows(); ++s) {
    const uint32_t batch = batch_of_slot(s);
    if (batch < limit_batch && row_of_slot_[s] >= 0 && (batch - oldest) / width < threshold) candidates_.push_back({stamp_[s], s});
  }
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return (a.stamp | 1) != (b.stamp | 1) ? a.stamp > b.stamp : a.slot > b.slot;
  });
}

bool SlotDirectory::reserve(uint32_t oldest_outstanding_batch, Stamp stamp, const std::vector<uint8_t>* pinned) {
  reserved_.clear();
  const size_t needed = missed_rows_.size();
  reserved_free_ = std::min(needed, free_.size());
  reserved_.assign(free_.rbegin(), free_.rbegin() + static_cast<std::ptrdiff_t>(reserved_free_));
  if (reserved_.size() == needed) return true;
  if (pinned) {  // rare: the stamps were too conservative
    for (int32_t s = 0; s < pool_rows() && reserved_.size() < needed; ++s) {
      if (row_of_slot_[s] >= 0 && !(*pinned)[s]) reserved_.push_back(s);
    }
    candidates_.clear();
    return reserved_.size() == needed;
  }
  const uint32_t limit = std::min(oldest_outstanding_batch, stamp.batch());
  bool collected = false;
  while (reserved_.size() < needed) {
    if (candidates_.empty()) {
      if (collected) return false;
      collected = true;
      collect_candidates(limit, std::max(needed, stamp_.size() / 8));
      continue;
    }
    const Candidate c = candidates_.back();
    candidates_.pop_back();
    if ((stamp_[c.slot] | 1) != (c.stamp | 1) || Stamp{c.stamp}.batch() >= limit || row_of_slot_[c.slot] < 0) continue;
    touch(c.slot, stamp.batch());  // so that it is not collected again
    reserved_.push_back(c.slot);
  }
  return true;
}

void SlotDirectory::commit(Stamp stamp, int64_t* slots) {
  free_.resize(free_.size() - reserved_free_);
  evictions_ += static_cast<int64_t>(reserved_.size() - reserved_free_);
  for (size_t k = 0; k < missed_rows_.size(); ++k) {
    const int32_t slot = reserved_[k];
    if (row_of_slot_[slot] >= 0) slot_of_row_[row_of_slot_[slot]] = 0;
    row_of_slot_[slot] = static_cast<int32_t>(missed_rows_[k]);
    slot_of_row_[missed_rows_[k]] = slot + 1;
  }
  for (const int64_t i : miss_positions_) {
    slots[i] = reserved_[-slots[i] - 1];
    stamp_[slots[i]] = stamp.at(i).value;
  }
  missed_rows_.clear();
  miss_positions_.clear();
  reserved_.clear();
  reserved_free_ = 0;
}

void SlotDirectory::rollback() {
  for (const int64_t row : missed_rows_) slot_of_row_[row] = 0;
  missed_rows_.clear();
  miss_positions_.clear();
  reserved_.clear();
  reserved_free_ = 0;
  candidates_.clear();
}

void SlotDirectory::drop(int32_t slot) {
  slot_of_row_[row_of_slot_[slot]] = 0;
  row_of_slot_[slot] = -1;
  stamp_[slot] = 0;
  free_.push_back(slot);
}

void SlotDirectory::age(uint32_t batches) {
  for (int32_t s = 0; s < pool_rows(); ++s) touch(s, batch_of_slot(s) > batches ? batch_of_slot(s) - batches : 0);
  candidates_.clear();
}

void SlotDirectory::sort_by_use(std::vector<int32_t>& slots) const {
  std::sort(slots.begin(), slots.end(), [this](int32_t a, int32_t b) {
    const uint64_t of_a = stamp_[a] | 1, of_b = stamp_[b] | 1;
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
  if (!missed_rows_.empty()) fail("slot directory: a batch is half looked up");
  size_t free_slots = 0, mapped = 0;
  for (int32_t s = 0; s < pool_rows(); ++s) {
    const int64_t row = row_of_slot_[s];
    if (row < 0) {
      ++free_slots;
      if (stamp_[s] & 1) fail("slot directory: a free slot is dirty");
    } else if (slot_of_row_[row] != s + 1) {
      fail("slot directory: a slot's row does not point back");
    }
  }
  if (free_slots != free_.size()) fail("slot directory: free list and free slots differ");
  for (size_t row = 0; row < slot_of_row_.size(); ++row) {
    if (slot_of_row_[row] < 0) fail("slot directory: a provisional entry was left");
    mapped += slot_of_row_[row] > 0;
  }
  if (mapped + free_slots != row_of_slot_.size()) fail("slot directory: rows and slots are not one to one");
}

}  // namespace mtrains
