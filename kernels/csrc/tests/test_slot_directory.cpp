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
    } else if (random_() % 3 == 0) {
      announce_one();
    } else if (random_() % 20 == 0) {
      withdraw_one();
    } else if (random_() % 8 == 0) {
      admit_some();
    } else {
      look_up();
    }
    std::set<int64_t> awaited;
    for (const auto& [number, ids] : announced_) awaited.insert(ids.begin(), ids.end());
    for (int64_t row = 0; row < directory_.rows(); ++row) {
      CHECK_EQ(directory_.wants(row), awaited.contains(row) && directory_.slot_of_row(row) < 0);
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
  size_t refused = 0, admitted = 0;

 private:
  void look_up() {
    const uint32_t batch = ++last_batch_;
    const bool dirty = random_() % 2;
    const Stamp stamp = Stamp::of(batch, dirty);
    const uint32_t oldest = outstanding_.empty() ? UINT32_MAX : outstanding_.begin()->first;
    uint64_t bit = 0;
    std::vector<int64_t> ids = draw();
    if (!announced_.empty() && random_() % 4) {  // mostly the oldest, seldom out of turn
      const auto at = random_() % 8 ? announced_.begin() : std::prev(announced_.end());
      bit = uint64_t{1} << (at->first % 64);
      ids = at->second;
      announced_.erase(at);
      set_first();
    }
    std::vector<int64_t> slots(ids.size());
    std::set<int64_t> missing(ids.begin(), ids.end()), hit;
    for (const int64_t row : held_) {
      if (row > 0 && missing.erase(row - 1)) hit.insert(row - 1);
    }
    const auto first_seen = directory_.lookup(ids.data(), 0, static_cast<int64_t>(ids.size()), stamp, bit, slots.data());
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

  std::vector<int64_t> draw() {
    std::vector<int64_t> ids(1 + below(random_, 2 * static_cast<uint64_t>(directory_.pool_rows())));
    const auto rows = static_cast<uint64_t>(directory_.rows());
    for (int64_t& id : ids) id = static_cast<int64_t>(below(random_, random_() % 2 ? std::min<uint64_t>(rows, 4) : rows));
    return ids;
  }

  void set_first() { directory_.set_first_announced(announced_.empty() ? last_announced_ + 1 : announced_.begin()->first); }

  void announce_one() {
    if (!announced_.empty() && last_announced_ + 1 - announced_.begin()->first >= 64) return;
    const std::vector<int64_t>& ids = announced_[++last_announced_] = draw();
    directory_.announce(ids.data(), 0, static_cast<int64_t>(ids.size()), uint64_t{1} << (last_announced_ % 64));
    set_first();
  }

  void withdraw_one() {
    if (announced_.empty()) return;
    auto at = announced_.begin();
    std::advance(at, static_cast<std::ptrdiff_t>(below(random_, announced_.size())));
    directory_.withdraw(at->second.data(), 0, static_cast<int64_t>(at->second.size()), uint64_t{1} << (at->first % 64));
    announced_.erase(at);
    set_first();
  }

  uint64_t next_announced_use(int64_t row) const {
    for (const auto& [number, ids] : announced_) {
      if (std::find(ids.begin(), ids.end(), row) != ids.end()) return number;
    }
    return UINT64_MAX;
  }

  void admit_some() {
    const uint32_t oldest = outstanding_.empty() ? last_batch_ + 1 : outstanding_.begin()->first;
    std::vector<int64_t> rows;
    for (int64_t row = 0; row < directory_.rows(); ++row) {
      if (random_() % 2) rows.push_back(row);
    }
    directory_.reserve_for_wanted(rows, oldest);
    const std::vector<int64_t> come(directory_.missed_rows().begin(), directory_.missed_rows().end());
    const std::vector<int32_t> into(directory_.reserved_slots().begin(), directory_.reserved_slots().end());
    CHECK_EQ(come.size(), into.size());
    uint64_t latest = 0;
    for (const int64_t row : come) {
      CHECK(directory_.wants(row));
      latest = std::max(latest, next_announced_use(row));
    }
    for (const int32_t slot : into) {
      for (const auto& [number, theirs] : outstanding_) CHECK(!theirs.contains(slot));
      if (held_[slot]) CHECK(next_announced_use(held_[slot] - 1) >= latest || next_announced_use(held_[slot] - 1) > next_announced_use(come[0]));
    }
    directory_.commit(Stamp::of(oldest - 1, false), nullptr);
    for (size_t k = 0; k < come.size(); ++k) held_[into[k]] = come[k] + 1;
    admitted += come.size();
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
  std::map<uint64_t, std::vector<int64_t>> announced_;  // and not begun
  uint64_t last_announced_ = 0;
};

TEST("a slot directory keeps its invariants and never evicts what an outstanding batch uses") {
  Random random = fresh_random();
  size_t refused = 0, admitted = 0;
  int64_t evictions = 0;
  for (uint32_t i = 0; i < 40 * rounds(); ++i) {
    const auto pool_rows = static_cast<int32_t>(1 + below(random, 8));
    History history(random, pool_rows + static_cast<int64_t>(below(random, 30)), pool_rows);
    for (int step = 0; step < 200; ++step) history.step();
    refused += history.refused;
    admitted += history.admitted;
    evictions += history.evictions();
  }
  CHECK(refused > 0 && evictions > 0 && admitted > 0);  // the histories met them all
}

// One table, every batch finished before the next one.
struct Pool {
  Pool(int64_t rows, int32_t pool_rows) : directory(rows, pool_rows) {}

  std::vector<int64_t> train(std::vector<int64_t> ids, uint64_t bit = 0) {  // the rows that left
    std::vector<int64_t> slots(ids.size()), left;
    const Stamp stamp = Stamp::of(++batch, false);
    directory.lookup(ids.data(), 0, static_cast<int64_t>(ids.size()), stamp, bit, slots.data());
    CHECK(directory.reserve(UINT32_MAX, stamp, nullptr));
    for (const int32_t slot : directory.reserved_slots()) {
      if (directory.row_of_slot(slot) >= 0) left.push_back(directory.row_of_slot(slot));
    }
    directory.commit(stamp, slots.data());
    directory.check();
    return left;
  }
  void announce(uint64_t number, std::vector<int64_t> ids) {
    directory.announce(ids.data(), 0, static_cast<int64_t>(ids.size()), uint64_t{1} << (number % 64));
  }

  SlotDirectory directory;
  uint32_t batch = 0;
};

using Rows = std::vector<int64_t>;

TEST("rows used once leave in the order in which they came") {
  Pool pool(1000, 20);
  for (int64_t row = 0; row < 20; ++row) CHECK(pool.train({row}).empty());
  for (int64_t row = 20; row < 60; ++row) CHECK(pool.train({row}) == Rows{row - 20});
}

TEST("victims of one batch leave in the order of their last use") {
  Pool pool(1000, 20);
  pool.train({5, 3, 9, 3, 1});
  pool.train({8, 2, 6});
  pool.train({20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32});
  CHECK((pool.train({40, 41, 42, 43, 44, 45}) == Rows{5, 9, 3, 1, 8, 2}));
}

TEST("of rows that are used often, once, and once in a long while, the pool learns to keep those that come again soonest") {
  Random random = fresh_random();
  Pool pool(1'000'000, 200);
  int64_t once = 1000;
  for (int batch = 0; batch < 1000; ++batch) {
    Rows ids;
    for (int k = 0; k < 10; ++k) ids.push_back(static_cast<int64_t>(below(random, 100)));  // of 100 rows each comes in every tenth batch
    for (int k = 0; k < 10; ++k) ids.push_back(100 + static_cast<int64_t>(below(random, 900)));  // of 900 in every 90th
    for (int k = 0; k < 30; ++k) ids.push_back(once++);
    pool.train(ids);
  }
  int often = 0, seldom = 0, unseen = 0;
  for (int64_t row = 0; row < 100; ++row) often += pool.directory.slot_of_row(row) >= 0;
  for (int64_t row = 100; row < 1000; ++row) seldom += pool.directory.slot_of_row(row) >= 0;
  for (int64_t row = 1000; row < once; ++row) unseen += pool.directory.slot_of_row(row) >= 0;
  CHECK(often >= 95);  // in the order of last uses it would be 34, and 120 of those used once
  CHECK(unseen <= 45);
  CHECK(seldom >= 50);
}

TEST("what is known of a row stays when it leaves, and when batches are renumbered") {
  Pool pool(1000, 4);
  const auto pace_of = [&](int64_t row) { return pool.directory.pace(pool.directory.slot_of_row(row)); };
  pool.train({0});
  CHECK_EQ(pace_of(0), ReuseRates::kOnce);
  for (int64_t row = 1; row < 8; ++row) pool.train({row});
  CHECK(pool.directory.slot_of_row(0) < 0);
  pool.directory.age(6);
  pool.batch -= 6;
  pool.train({0});  // 8 batches after
  CHECK_EQ(pace_of(0), ReuseRates::bin(8));
  for (int64_t row = 20; row < 50; ++row) pool.train({row});
  CHECK(pool.directory.slot_of_row(0) < 0);
  pool.announce(1, {0});
  pool.directory.set_first_announced(1);
  const Rows rows = {0};
  pool.directory.reserve_for_wanted(rows, pool.batch + 1);
  CHECK_EQ(pool.directory.missed_rows().size(), size_t{1});
  pool.directory.commit(Stamp::of(pool.batch, false), nullptr);  // it came along, and is not used yet
  pool.directory.check();
  CHECK_EQ(pace_of(0), ReuseRates::bin(8));
  pool.train({0}, 2);  // 31 batches after its last use
  CHECK_EQ(ReuseRates::bin(31), ReuseRates::bin(8) + 7);
  CHECK_EQ(pace_of(0), ReuseRates::bin(8) + 3);
}

TEST("awaited rows leave after all others, those used last first") {
  Pool pool(1000, 8);
  pool.train({0, 1, 2, 3, 4, 5, 6, 7});
  pool.announce(1, {6, 5});
  pool.announce(2, {1, 0, 6});
  pool.announce(3, {2});
  pool.announce(70, {});  // nothing
  pool.directory.set_first_announced(1);
  CHECK((pool.train({10, 11, 12}) == Rows{3, 4, 7}));
  CHECK((pool.train({13, 14, 15}) == Rows{10, 11, 12}));
  CHECK((pool.train({20, 21, 22, 23, 24, 25}) == Rows{0, 1, 2, 13, 14, 15}));
  CHECK(pool.directory.wants(0) && pool.directory.wants(2) && !pool.directory.wants(5) && !pool.directory.wants(13));
  pool.directory.set_first_announced(2);
  CHECK(pool.train({6, 5}, 2).empty());
  CHECK((pool.train({1, 0, 6}, 4).size() == 2));
  CHECK(pool.directory.slot_of_row(5) >= 0 || pool.directory.slot_of_row(20) < 0);
}

TEST("of rows awaited equally long the clean ones leave first") {
  Pool pool(1000, 4);
  pool.train({0, 1, 2, 3});
  pool.announce(1, {0, 1, 2, 3});
  pool.directory.set_first_announced(1);
  for (const int64_t row : {0, 3}) pool.directory.mark_dirty(pool.directory.slot_of_row(row));
  CHECK((pool.train({10, 11}) == Rows{1, 2}));
}

TEST("a batch withdrawn protects nothing any more") {
  Pool pool(1000, 4);
  pool.train({0, 1, 2, 3});
  const Rows ids = {0, 1, 9};
  pool.announce(1, ids);
  pool.directory.set_first_announced(1);
  CHECK((pool.train({4, 5}) == Rows{2, 3}));
  CHECK(pool.directory.wants(9));
  pool.directory.withdraw(ids.data(), 0, 3, 2);
  pool.directory.check();
  CHECK(!pool.directory.wants(9));
  pool.train({4, 5});
  CHECK((pool.train({6, 7}) == Rows{0, 1}));
}

TEST("a pool with a slot for every row keeps the invariants, has each row in the slot of its number and evicts nothing") {
  Random random = fresh_random();
  History history(random, 40, 40);
  for (uint32_t step = 0; step < 2000 * rounds(); ++step) history.step();
  CHECK_EQ(history.evictions(), int64_t{0});
  Pool pool(10, 10);
  pool.train({7, 2, 7, 9});
  for (const int64_t row : {7, 2, 9}) CHECK_EQ(pool.directory.slot_of_row(row), static_cast<int32_t>(row));
  CHECK_EQ(pool.directory.resident(), 3);
}

TEST("a slot directory of many rows keeps its invariants too") {
  Random random = fresh_random();
  History history(random, 5000, 700);
  for (int step = 0; step < 60; ++step) history.step();
  CHECK(history.evictions() > 0);
}

}  // namespace
}  // namespace mtrains::test
