#include "slot_directory.h"

#include <algorithm>
#include <map>
#include <set>

#include "check.h"

namespace mtrains::test {
namespace {

// Batches that finish out of order, tables barely larger than their pools, few stamps before they are renumbered.
class History {
 public:
  History(Random& random, int64_t rows, int32_t pool_rows) : random_(random), directory_(rows, pool_rows), held_(pool_rows) {}

  void step() {
    if (!outstanding_.empty() && random_() % 2) {
      auto at = outstanding_.begin();
      std::advance(at, static_cast<std::ptrdiff_t>(below(random_, outstanding_.size())));
      outstanding_.erase(at);
    } else if (random_() % 50 == 0) {
      age();
    } else if (random_() % 20 == 0) {
      drop_one();
    } else {
      look_up();
    }
    directory_.check();
    std::set<int64_t> resident;
    for (int32_t s = 0; s < directory_.pool_rows(); ++s) {
      CHECK_EQ(directory_.row_of_slot(s), held_[s] - 1);
      if (held_[s] == 0) continue;
      CHECK(resident.insert(held_[s] - 1).second);
      CHECK_EQ(directory_.slot_of_row(held_[s] - 1), s);
    }
    CHECK_EQ(directory_.resident(), static_cast<int32_t>(resident.size()));
    for (int64_t row = 0; row < directory_.rows(); ++row) CHECK((directory_.slot_of_row(row) >= 0) == resident.contains(row));
  }

  int64_t evictions() const { return directory_.evictions(); }
  size_t refused = 0;

 private:
  void look_up() {
    const uint32_t batch = ++last_batch_;
    const bool dirty = random_() % 2;
    const Stamp stamp = Stamp::of(batch, dirty);
    const uint32_t oldest = outstanding_.empty() ? UINT32_MAX : outstanding_.begin()->first;
    std::vector<int64_t> ids(1 + below(random_, 2 * static_cast<uint64_t>(directory_.pool_rows()))), slots(ids.size());
    const auto rows = static_cast<uint64_t>(directory_.rows());
    for (int64_t& id : ids) id = static_cast<int64_t>(below(random_, random_() % 2 ? std::min<uint64_t>(rows, 4) : rows));
    std::set<int64_t> missing(ids.begin(), ids.end()), hit;
    for (const int64_t row : held_) {
      if (row > 0 && missing.erase(row - 1)) hit.insert(row - 1);
    }
    const auto first_seen = directory_.lookup(ids.data(), 0, static_cast<int64_t>(ids.size()), stamp, slots.data());
    CHECK_EQ(first_seen, static_cast<int64_t>(hit.size()));
    CHECK(std::set<int64_t>(directory_.missed_rows().begin(), directory_.missed_rows().end()) == missing);
    CHECK_EQ(directory_.missed_rows().size(), missing.size());
    bool room = directory_.reserve(oldest, stamp, nullptr);
    std::vector<uint8_t> pinned(held_.size());
    for (size_t s = 0; s < held_.size(); ++s) pinned[s] = held_[s] > 0 && hit.contains(held_[s] - 1);
    for (const auto& [number, theirs] : outstanding_) {
      for (const int64_t slot : theirs) pinned[slot] = 1;
    }
    const size_t free = held_.size() - static_cast<size_t>(std::count(pinned.begin(), pinned.end(), 1));
    if (!room) room = directory_.reserve(0, stamp, &pinned);
    CHECK_EQ(room, missing.size() <= free);
    if (!room) {
      ++refused;
      directory_.rollback();
      return;
    }
    for (const int32_t slot : directory_.reserved_slots()) {
      CHECK(!pinned[slot]);
      held_[slot] = 0;
    }
    directory_.commit(stamp, slots.data());
    for (size_t i = 0; i < ids.size(); ++i) {
      CHECK_EQ(directory_.row_of_slot(static_cast<int32_t>(slots[i])), ids[i]);
      CHECK(!dirty || directory_.dirty(static_cast<int32_t>(slots[i])));
      held_[slots[i]] = ids[i] + 1;
    }
    outstanding_[batch] = {slots.begin(), slots.end()};
  }

  void age() {
    const uint32_t oldest = outstanding_.empty() ? last_batch_ + 1 : outstanding_.begin()->first;
    const uint32_t by = oldest - 1;
    directory_.age(by);
    std::map<uint32_t, std::set<int64_t>> renumbered;
    for (auto& [batch, slots] : outstanding_) renumbered[batch - by] = std::move(slots);
    outstanding_ = std::move(renumbered);
    last_batch_ -= by;
  }

  void drop_one() {
    const auto slot = static_cast<int32_t>(below(random_, held_.size()));
    for (const auto& [batch, slots] : outstanding_) {
      if (slots.contains(slot)) return;
    }
    if (held_[slot] == 0) return;
    directory_.drop(slot);
    held_[slot] = 0;
  }

  Random& random_;
  SlotDirectory directory_;
  std::vector<int64_t> held_;  // by slot: row + 1, or 0
  std::map<uint32_t, std::set<int64_t>> outstanding_;
  uint32_t last_batch_ = 0;
};

TEST("a slot directory keeps its invariants and never evicts what an outstanding batch uses") {
  Random random = fresh_random();
  size_t refused = 0;
  int64_t evictions = 0;
  for (uint32_t i = 0; i < 40 * rounds(); ++i) {
    const auto pool_rows = static_cast<int32_t>(1 + below(random, 8));
    History history(random, pool_rows + static_cast<int64_t>(below(random, 30)), pool_rows);
    for (int step = 0; step < 200; ++step) history.step();
    refused += history.refused;
    evictions += history.evictions();
  }
  CHECK(refused > 0 && evictions > 0);  // the histories met both
}

TEST("rows leave in the order in which batches, and ids within them, used them last") {
  Random random = fresh_random();
  for (uint32_t i = 0; i < 20 * rounds(); ++i) {
    const auto pool_rows = static_cast<int32_t>(20 + below(random, 200));
    SlotDirectory directory(3 * pool_rows, pool_rows);
    std::map<std::pair<uint32_t, size_t>, int64_t> row_of_use;  // the last use of each resident row
    std::map<int64_t, std::pair<uint32_t, size_t>> use_of_row;
    for (uint32_t batch = 1; batch <= 100; ++batch) {
      std::vector<int64_t> ids(below(random, static_cast<uint64_t>(pool_rows))), slots(ids.size());
      for (int64_t& id : ids) id = static_cast<int64_t>(below(random, static_cast<uint64_t>(random() % 2 ? 3 * pool_rows : pool_rows / 2)));
      const Stamp stamp = Stamp::of(batch, random() % 2);
      const auto middle = static_cast<int64_t>(below(random, ids.size() + 1));  // two features
      directory.lookup(ids.data(), 0, middle, stamp, slots.data());
      directory.lookup(ids.data(), middle, static_cast<int64_t>(ids.size()), stamp, slots.data());
      for (size_t at = 0; at < ids.size(); ++at) {
        if (const auto before = use_of_row.find(ids[at]); before != use_of_row.end()) row_of_use.erase(before->second);
        use_of_row[ids[at]] = {batch, at};
        row_of_use[{batch, at}] = ids[at];
      }
      CHECK(directory.reserve(UINT32_MAX, stamp, nullptr));
      for (const int32_t slot : directory.reserved_slots()) {
        if (directory.row_of_slot(slot) < 0) continue;
        const auto oldest = row_of_use.begin();
        CHECK_EQ(directory.row_of_slot(slot), oldest->second);
        use_of_row.erase(oldest->second);
        row_of_use.erase(oldest);
      }
      directory.commit(stamp, slots.data());
      directory.check();
    }
    CHECK(directory.evictions() > 0);
  }
}

TEST("a slot directory of many rows keeps its invariants too") {
  Random random = fresh_random();
  History history(random, 5000, 700);
  for (int step = 0; step < 60; ++step) history.step();
  CHECK(history.evictions() > 0);
}

}  // namespace
}  // namespace mtrains::test
