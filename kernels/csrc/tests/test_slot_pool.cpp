// A slot pool trains like a table in memory: one thread begins batches and trains them, others wait for and release them.
#include "slot_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <set>
#include <thread>
#include <utility>

#include "check.h"
#include "media.h"
#include "memory_volume.h"

namespace mtrains::test {
namespace {

constexpr uint32_t kBytes = 64;
constexpr int64_t kRows[2] = {300, 90};
constexpr int32_t kPoolRows[2] = {70, 40};

struct Trainer {
  // `whole`: pools have a slot for every row, and ids are slots.
  explicit Trainer(Volume& v, bool whole = false) : volume(v), ids_are_slots(whole) {
    for (size_t t = 0; t < 2; ++t) pool_rows[t] = whole ? static_cast<int32_t>(kRows[t]) : kPoolRows[t];
    std::vector<SlotPoolTable> tables;
    for (size_t t = 0; t < 2; ++t) {
      const std::string name = std::string("t").append(std::to_string(t));
      ids[t] = v.table({name, kRows[t], kBytes}, {});
      weights[t].assign(static_cast<size_t>(pool_rows[t]) * (kBytes - 16), std::byte{0xEE});
      state[t].assign(static_cast<size_t>(pool_rows[t]) * 16, std::byte{0xEE});
      tables.push_back({name, &v, ids[t], kRows[t], pool_rows[t],
                        {{weights[t].data(), kBytes - 16, kBytes - 16}, {state[t].data(), 16, 16}}});
      versions[t].assign(static_cast<size_t>(kRows[t]), 0);
    }
    pool = std::make_unique<SlotPool>(std::move(tables), std::vector<int32_t>{0, 0, 1}, 50);  // stamps are renumbered often
  }

  struct Step {
    std::vector<int64_t> ids, offsets, slots;
    uint64_t seq = 0, announced = 0;
  };
  std::unique_ptr<Step> draw(Random& random) {
    auto step = std::make_unique<Step>();
    step->offsets.push_back(0);
    for (const size_t t : {0, 0, 1}) {
      for (uint64_t n = below(random, 12); n > 0; --n) {
        step->ids.push_back(static_cast<int64_t>(below(random, random() % 2 ? 10 : static_cast<uint64_t>(kRows[t]))));
      }
      step->offsets.push_back(static_cast<int64_t>(step->ids.size()));
    }
    step->slots.assign(step->ids.size(), -1);
    return step;
  }
  static Batch batch_of(const Step& step) {
    return {step.ids.data(), false, step.offsets.data(), false, 1, static_cast<int64_t>(step.ids.size())};
  }
  void announce(Step& step) { step.announced = pool->announce(batch_of(step)); }
  uint64_t begin(Step& step, bool hard) {
    const uint64_t announced = std::exchange(step.announced, 0), lost = step.seq;
    int64_t* const slots = ids_are_slots ? nullptr : step.slots.data();
    return step.seq = hard ? pool->begin(batch_of(step), slots, true, announced, lost)
                           : pool->prefetch(batch_of(step), slots, true, announced, lost);
  }
  // Every row of the batch is what it was, and becomes the next version, in its slot.
  void train(const Step& step) {
    std::set<std::pair<size_t, int64_t>> trained;
    for (size_t f = 0; f < 3; ++f) {
      const size_t t = f / 2;
      for (int64_t i = step.offsets[f]; i < step.offsets[f + 1]; ++i) {
        const int64_t row = step.ids[i], slot = ids_are_slots ? row : step.slots[i];
        CHECK(slot >= 0 && slot < pool_rows[t]);
        if (!trained.insert({t, row}).second) continue;
        std::byte record[kBytes];
        std::memcpy(record, weights[t].data() + slot * (kBytes - 16), kBytes - 16);
        std::memcpy(record + kBytes - 16, state[t].data() + slot * 16, 16);
        CHECK_EQ(version_of(record, kBytes, row), versions[t][row]);
        write_record(record, kBytes, row, ++versions[t][row]);
        std::memcpy(weights[t].data() + slot * (kBytes - 16), record, kBytes - 16);
        std::memcpy(state[t].data() + slot * 16, record + kBytes - 16, 16);
      }
    }
  }
  void check_all() {
    pool->check();
    pool->flush();
    for (size_t t = 0; t < 2; ++t) {
      CHECK(get_versions(volume, ids[t], kBytes, rows_up_to(kRows[t])) == versions[t]);
      std::vector<std::byte> records(static_cast<size_t>(kRows[t]) * kBytes);
      pool->read(t, 0, kRows[t], {{records.data(), kBytes, kBytes - 16}, {records.data() + kBytes - 16, kBytes, 16}});
      for (int64_t r = 0; r < kRows[t]; ++r) CHECK_EQ(version_of(records.data() + r * kBytes, kBytes, r), versions[t][r]);
    }
  }

  Volume& volume;
  const bool ids_are_slots;
  int32_t pool_rows[2];
  TableId ids[2];
  std::vector<std::byte> weights[2], state[2];
  std::vector<uint64_t> versions[2];
  std::unique_ptr<SlotPool> pool;
};

// Prefetched steps wait in a queue; trained ones go to threads that release them, each twice, in any order.
void train_on_threads(Random& random, Volume& volume, uint32_t steps, bool whole = false) {
  std::deque<std::unique_ptr<Trainer::Step>> coming, ahead, trained;  // before the pool: its thread uses them until it goes
  Trainer trainer(volume, whole);
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Threads releasers;
  for (int i = 0; i < 3; ++i) {
    releasers.start([&, seed = random()] {
      Random mine(seed);
      std::unique_lock lock(mutex);
      for (;;) {
        changed.wait(lock, [&] { return done || !trained.empty(); });
        if (trained.empty()) return;
        const size_t at = below(mine, trained.size());
        const std::unique_ptr<Trainer::Step> step = std::move(trained[at]);
        trained.erase(trained.begin() + static_cast<std::ptrdiff_t>(at));
        lock.unlock();
        trainer.pool->wait(step->seq);
        trainer.pool->release(step->seq);
        CHECK(!trainer.pool->alive(step->seq));
        trainer.pool->release(step->seq);
        CHECK(trainer.pool->outstanding() >= 0 && trainer.pool->resident(0) <= trainer.pool_rows[0]);
        lock.lock();
      }
    });
  }
  const auto end = [&](bool*) {
    {
      std::lock_guard lock(mutex);
      done = true;
    }
    changed.notify_all();
  };
  std::unique_ptr<bool, decltype(end)> guard(&done, end);  // releasers end also when a check fails
  const auto begin_when_released = [&](Trainer::Step& step, bool hard) {
    for (;;) {
      try {
        trainer.begin(step, hard);
        return;
      } catch (const Error& e) {
        const bool releasers_are_behind = e.kind() == ErrorKind::kPoolTooSmall || e.kind() == ErrorKind::kTicket;
        if (!releasers_are_behind) throw;
        std::this_thread::yield();
      }
    }
  };
  uint64_t prefetched = 0, withdrawn = 0;
  for (uint32_t s = 0; s < steps; ++s) {
    while (coming.size() < 4 + below(random, 4)) {
      coming.push_back(trainer.draw(random));
      if (random() % 8) trainer.announce(*coming.back());
      if (random() % 20 == 0 && coming.back()->announced) {
        trainer.pool->withdraw(std::exchange(coming.back()->announced, 0));
        ++withdrawn;
      }
    }
    while (ahead.size() < 1 + below(random, 3)) {
      if (coming.empty()) coming.push_back(trainer.draw(random));  // many were not wanted after all
      ahead.push_back(std::move(coming.front()));
      coming.pop_front();
      begin_when_released(*ahead.back(), false);
      if (random() % 20 == 0) {  // it is not wanted after all
        trainer.pool->release(ahead.back()->seq);
        ahead.pop_back();
      }
    }
    std::unique_ptr<Trainer::Step> step = std::move(ahead.front());
    ahead.pop_front();
    bool acquired = trainer.pool->acquire(step->seq, true);
    if (!acquired && random() % 2) {
      begin_when_released(*step, false);
      acquired = trainer.pool->acquire(step->seq, true);
    }
    if (acquired) {
      ++prefetched;
    } else {
      begin_when_released(*step, true);
    }
    trainer.pool->wait(step->seq);
    trainer.train(*step);
    {
      std::lock_guard lock(mutex);
      trained.push_back(std::move(step));
    }
    changed.notify_one();
    if (s % 20 == 0) trainer.pool->check();
    if (s % 50 == 0) trainer.pool->flush();
  }
  for (const auto& step : ahead) trainer.pool->release(step->seq);
  for (const auto& step : coming) trainer.pool->withdraw(step->announced);
  guard.reset();
  releasers.join();
  CHECK_EQ(trainer.pool->outstanding(), 0);
  CHECK_EQ(trainer.pool->announced(), 0);
  const auto last = trainer.draw(random);
  trainer.begin(*last, false);
  CHECK(trainer.pool->acquire(last->seq, true));  // none that gave way is before it
  trainer.pool->release(last->seq);
  trainer.check_all();
  const SlotPoolStats stats = trainer.pool->stats(0);
  CHECK(prefetched > 0 && withdrawn > 0);
  if (whole) {
    CHECK(stats.evictions == 0 && stats.misses == trainer.pool->resident(0) && stats.refetched_rows == 0);
    Trainer::Step all;
    all.offsets = {0, kRows[0], kRows[0], kRows[0] + kRows[1]};
    for (const int64_t rows : kRows) {
      for (int64_t r = 0; r < rows; ++r) all.ids.push_back(r);
    }
    trainer.begin(all, true);
    trainer.pool->release(all.seq);
    CHECK(trainer.pool->full());
  } else {
    CHECK(!trainer.pool->full());
    CHECK(stats.evictions > 0 && stats.write_backs > 0 && stats.write_backs <= stats.evictions);
  }
}

TEST("a slot pool over memory trains like a table in memory, released on other threads") {
  Random random = fresh_random();
  MemoryVolume volume;
  train_on_threads(random, volume, 600 * rounds());
}

TEST("where pools have a slot for every row, ids are slots, and no array of slots is needed") {
  Random random = fresh_random();
  MemoryVolume volume;
  train_on_threads(random, volume, 600 * rounds(), true);
}

TEST_ON_EACH_MEDIUM("a slot pool over an SSD volume trains like a table in memory, released on other threads") {
  Random random = fresh_random();
  const Folder folder;
  const auto volume = open_volume(options_for(medium, {folder.path()}, 64u << 20));
  train_on_threads(random, *volume, 300 * rounds());
}

TEST("a batch that does not fit beside hard tickets is refused and changes nothing") {
  MemoryVolume volume;
  Trainer trainer(volume);
  Trainer::Step big, small;
  big.ids = rows_up_to(kPoolRows[0]);
  big.offsets = {0, kPoolRows[0], kPoolRows[0], kPoolRows[0]};
  big.slots.assign(big.ids.size(), -1);
  CHECK(trainer.begin(big, true) != 0);
  trainer.pool->wait(big.seq);
  trainer.train(big);
  small.ids = {kRows[0] - 1};
  small.offsets = {0, 1, 1, 1};
  small.slots = {-1};
  CHECK(!trainer.pool->acquire(trainer.begin(small, false), true));  // a prefetch declines
  check_error(ErrorKind::kPoolTooSmall, [&] { trainer.begin(small, true); });
  small.ids = {kRows[0]};
  check_error(ErrorKind::kIdOutOfRange, [&] { trainer.begin(small, true); });
  trainer.pool->check();
  CHECK_EQ(trainer.pool->resident(0), kPoolRows[0]);
  trainer.pool->release(big.seq);
  small.ids = {kRows[0] - 1};
  CHECK(trainer.begin(small, true) != 0);
  trainer.pool->wait(small.seq);
  trainer.train(small);
  trainer.pool->release(small.seq);
  trainer.check_all();
}

// All rows of table 0 are ids of its first feature.
Trainer::Step step_of(std::vector<int64_t> of_table_0, std::vector<int64_t> of_table_1) {
  Trainer::Step step;
  const auto first = static_cast<int64_t>(of_table_0.size());
  step.ids = std::move(of_table_0);
  step.ids.insert(step.ids.end(), of_table_1.begin(), of_table_1.end());
  step.offsets = {0, first, first, static_cast<int64_t>(step.ids.size())};
  step.slots.assign(step.ids.size(), -1);
  return step;
}

std::vector<int64_t> rows_between(int64_t begin, int64_t end) {
  std::vector<int64_t> rows;
  for (int64_t r = begin; r < end; ++r) rows.push_back(r);
  return rows;
}

// Refuses its first get, some time after that has come.
class Refusing final : public Volume {
 public:
  TableId table(const TableSpec& spec, const Initializer& init) override { return volume_.table(spec, init); }
  void put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts) override {
    volume_.put(table, rows, slots, parts);
  }
  uint64_t submit_get(std::vector<GetRequest> requests, std::function<void()> ready) override {
    if (!came.exchange(true)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      throw Error(ErrorKind::kVolumeIo, "refused");
    }
    return volume_.submit_get(std::move(requests), std::move(ready));
  }
  Neighbours wait(uint64_t token) override { return volume_.wait(token); }
  void flush() override {}
  void checkpoint(uint64_t) override {}
  std::vector<uint64_t> epochs() const override { return {}; }
  void restore(uint64_t) override {}
  VolumeStats stats() const override { return volume_.stats(); }
  const char* backend() const override { return "memory"; }
  std::string id() const override { return "memory, refusing"; }
  void close() override { volume_.close(); }

  std::atomic<bool> came{false};

 private:
  MemoryVolume volume_;
};

TEST("a forward cannot claim a batch whose reads are being refused") {
  Refusing volume;
  Trainer trainer(volume);
  Trainer::Step step = step_of({1, 2}, {3});
  trainer.begin(step, false);
  while (!volume.came) std::this_thread::yield();
  CHECK(!trainer.pool->acquire(step.seq, true));
  trainer.pool->check();
  trainer.begin(step, true);
  trainer.pool->wait(step.seq);
  trainer.train(step);
  trainer.pool->release(step.seq);
  CHECK_EQ(trainer.pool->stats(0).batches, 1);
  trainer.check_all();
}

TEST("of a batch that gave way, what was announced still is") {
  MemoryVolume volume;
  Trainer trainer(volume);
  // Table 0 is full of a batch that trains. Of table 1 the coming batch uses rows 0 to 9, a later one all others that are there.
  Trainer::Step others = step_of({}, rows_between(0, kPoolRows[1])), full = step_of(rows_between(0, kPoolRows[0]), {});
  Trainer::Step coming = step_of({kRows[0] - 1}, rows_between(0, 10)), later = step_of({}, rows_between(10, kPoolRows[1]));
  trainer.begin(others, true);
  trainer.pool->release(others.seq);
  trainer.announce(coming);
  trainer.announce(later);
  trainer.begin(full, true);
  CHECK(!trainer.pool->acquire(trainer.begin(coming, false), true));
  CHECK_EQ(trainer.pool->announced(), 2);
  trainer.pool->check();
  trainer.pool->release(full.seq);
  Trainer::Step between = step_of({}, rows_between(kPoolRows[1], kPoolRows[1] + 5));
  trainer.begin(between, true);
  for (int64_t row = 0; row < 10; ++row) CHECK(trainer.pool->slot_of_row(1, row) >= 0);
  trainer.pool->release(between.seq);
  CHECK(trainer.pool->acquire(trainer.begin(coming, false), true));
  CHECK_EQ(trainer.pool->announced(), 1);
  CHECK_EQ(trainer.pool->stats(1).misses, kPoolRows[1] + 5);
  trainer.pool->release(coming.seq);
  trainer.pool->withdraw(later.announced);
  trainer.check_all();
}

TEST("a batch that gave way and does not come is not announced any more, and none waits for it") {
  MemoryVolume volume;
  Trainer trainer(volume);
  Trainer::Step full = step_of(rows_between(0, kPoolRows[0]), {}), first = step_of({200}, {1}), second = step_of({0}, {1});
  trainer.begin(full, true);
  trainer.announce(first);
  trainer.announce(second);
  CHECK(!trainer.pool->acquire(trainer.begin(first, false), true));
  CHECK(!trainer.pool->acquire(trainer.begin(second, false), true));  // it has room, but is not the next
  CHECK_EQ(trainer.pool->announced(), 2);
  trainer.pool->release(first.seq);
  CHECK_EQ(trainer.pool->announced(), 1);
  CHECK(trainer.pool->acquire(trainer.begin(second, false), true));
  CHECK_EQ(trainer.pool->announced(), 0);
  trainer.pool->release(second.seq);
  trainer.pool->release(full.seq);
  trainer.check_all();
}

}  // namespace
}  // namespace mtrains::test
