#include "table_profiler.h"

#include <algorithm>
#include <list>
#include <set>

#include "check.h"

namespace mtrains::test {
namespace {

std::vector<int64_t> some_ids(Random& random, int64_t rows, size_t most) {
  std::vector<int64_t> ids(below(random, most + 1));
  for (int64_t& id : ids) id = static_cast<int64_t>(below(random, static_cast<uint64_t>(random() % 2 ? rows : std::max<int64_t>(1, rows / 8))));
  return ids;
}

// Rows in the order of their last use, the newest at the end; all of a batch is looked up before any of it is used.
struct Lru {
  size_t size;
  int64_t misses = 0;
  std::list<int64_t> rows{};

  void use(const std::vector<int64_t>& batch) {
    for (const int64_t row : std::set<int64_t>(batch.begin(), batch.end())) misses += std::find(rows.begin(), rows.end(), row) == rows.end();
    for (const int64_t row : batch) {
      rows.remove(row);
      rows.push_back(row);
    }
    while (rows.size() > size) rows.pop_front();
  }
};

TEST("the lru curve is that of caches of each size, through many renumberings of its times") {
  Random random = fresh_random();
  for (uint32_t round = 0; round < 20 * rounds(); ++round) {
    const auto rows = static_cast<int64_t>(1 + below(random, 40));
    std::set<int64_t> sizes;
    for (int i = 0; i < 4; ++i) sizes.insert(static_cast<int64_t>(1 + below(random, 45)));
    LruCurve curve(rows, {sizes.begin(), sizes.end()});
    std::vector<Lru> caches;
    for (const int64_t size : sizes) caches.push_back({static_cast<size_t>(size)});
    for (int b = 0; b < 100; ++b) {
      const auto ids = some_ids(random, rows, 12);
      curve.use(ids);
      for (Lru& cache : caches) cache.use(ids);
      const std::vector<int64_t> misses = curve.misses();
      for (size_t k = 0; k < caches.size(); ++k) CHECK_EQ(misses[k], caches[k].misses);
    }
  }
}

TEST("a sample names as many rows as asked for, each once") {
  Random random = fresh_random();
  for (uint32_t round = 0; round < 100 * rounds(); ++round) {
    const auto rows = static_cast<int64_t>(1 + below(random, 3000)), sampled = static_cast<int64_t>(1 + below(random, static_cast<uint64_t>(rows)));
    const RowSample sample(rows, sampled, random());
    std::set<int64_t> names;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t name = sample.name(row);
      if (name < 0) continue;
      CHECK(name < sampled);
      CHECK(names.insert(name).second);
    }
    CHECK_EQ(static_cast<int64_t>(names.size()), sampled);
  }
}

TEST("the profiler of a table keeps its directories whole, in any window, and its pools never miss more rows than batches have") {
  Random random = fresh_random();
  for (uint32_t round = 0; round < 20 * rounds(); ++round) {
    const auto rows = static_cast<int64_t>(1 + below(random, 300)), sampled = static_cast<int64_t>(1 + below(random, static_cast<uint64_t>(rows)));
    TableProfiler profiler(rows, sampled, random(), {1, 1 + rows / 4, rows}, {0, 1, 7, 64}, static_cast<uint32_t>(below(random, 3)), 5);
    int64_t lookups = 0;
    for (int b = 0; b < 100; ++b) {
      const auto ids = some_ids(random, rows, 20);
      lookups += static_cast<int64_t>(ids.size());
      profiler.push(std::span<const int64_t>(ids));
      if (b == 99) profiler.finish();
      for (const MissSimulator& simulator : profiler.simulators()) simulator.check();
    }
    CHECK_EQ(profiler.counts().lookups, lookups);
    const TableProfiler::SampleCounts& s = profiler.sample_counts();
    for (const MissSimulator& simulator : profiler.simulators()) {
      CHECK_EQ(simulator.looked_up(), uint64_t{100});
      for (const MissSimulator::Pool& pool : simulator.pools()) CHECK(pool.write_backs <= pool.misses && pool.misses <= s.of_1.unique_rows);
      CHECK(simulator.pools().back().directory != nullptr);
      CHECK_EQ(simulator.pools().back().misses, static_cast<int64_t>(simulator.pools().back().directory->resident()));
    }
    int64_t reuses = 0;
    for (const int64_t count : s.reuse) reuses += count;
    CHECK_EQ(reuses, s.of_1.unique_rows);
  }
}

TEST("ids outside the table, and sizes that cannot be, are refused") {
  TableProfiler profiler(10, 10, 0, {5}, {0}, 0, 4);
  const std::vector<int64_t> bad{3, 10};
  check_error(ErrorKind::kIdOutOfRange, [&] { profiler.push(std::span<const int64_t>(bad)); });
  CHECK_EQ(profiler.counts().lookups, int64_t{0});
  check_error(ErrorKind::kConfiguration, [] { TableProfiler(0, 1, 0, {1}, {0}, 0, 4); });
  check_error(ErrorKind::kConfiguration, [] { TableProfiler(10, 11, 0, {1}, {0}, 0, 4); });
  check_error(ErrorKind::kConfiguration, [] { TableProfiler(10, 10, 0, {3, 2}, {0}, 0, 4); });
  check_error(ErrorKind::kConfiguration, [] { TableProfiler(10, 10, 0, {1}, {65}, 0, 4); });
}

}  // namespace
}  // namespace mtrains::test
