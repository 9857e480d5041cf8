#include "table_profiler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "errors.h"

namespace mtrains {

namespace {

std::vector<int64_t> scaled(const std::vector<int64_t>& pool_rows, int64_t rows, int64_t sampled) {
  if (sampled > INT32_MAX / 4) throw Error(ErrorKind::kConfiguration, "a profile samples at most " + std::to_string(INT32_MAX / 4) + " rows, got " + std::to_string(sampled));
  if (!std::is_sorted(pool_rows.begin(), pool_rows.end())) throw Error(ErrorKind::kConfiguration, "the pool sizes of a profile must rise");
  std::vector<int64_t> pools;
  const double share = static_cast<double>(sampled) / static_cast<double>(rows);
  for (const int64_t p : pool_rows) pools.push_back(std::max<int64_t>(1, std::llround(static_cast<double>(p) * share)));
  return pools;
}

}  // namespace

TableProfiler::TableProfiler(int64_t rows, int64_t sampled_rows, uint64_t seed, const std::vector<int64_t>& pool_rows,
                             const std::vector<uint32_t>& lookaheads, uint32_t outstanding, int64_t window_batches)
    : rows_(rows), sample_(rows, sampled_rows, seed), scaled_pools_(scaled(pool_rows, rows, sampled_rows)), in_batch_(rows), used_(rows),
      last_batch_(static_cast<size_t>(sampled_rows)), uses_(static_cast<size_t>(sampled_rows)),
      lru_(sampled_rows, scaled_pools_) {
  for (const uint32_t lookahead : lookaheads) simulators_.emplace_back(sampled_rows, scaled_pools_, lookahead, outstanding);
  sample_counts_.windows.batches = std::max<int64_t>(1, window_batches);
}

template <class Index>
int64_t TableProfiler::unique(std::span<const Index> ids) {
  int64_t count = 0;
  for (const Index id : ids) {
    if (in_batch_.contains(id)) continue;
    in_batch_.add(id);
    ++count;
  }
  for (const Index id : ids) in_batch_.remove(id);
  return count;
}

template <class Index>
void TableProfiler::push(std::span<const Index> ids) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || static_cast<int64_t>(ids[i]) >= rows_) {
      throw Error(ErrorKind::kIdOutOfRange, "id " + std::to_string(ids[i]) + " (position " + std::to_string(i) + ") is outside [0, " + std::to_string(rows_) + ")");
    }
  }
  ++counts_.batches;
  counts_.lookups += static_cast<int64_t>(ids.size());
  counts_.unique_rows += unique(ids);
  counts_.unique_rows_of_quarter += unique(ids.first(ids.size() / 4));
  counts_.unique_rows_of_sixteenth += unique(ids.first(ids.size() / 16));
  std::vector<int64_t> names;
  for (const Index id : ids) {
    ++counts_.lookups_of_range[static_cast<size_t>(static_cast<int64_t>(id) * static_cast<int64_t>(kRanges) / rows_)];
    if (!used_.contains(id)) {
      used_.add(id);
      ++counts_.used_rows;
    }
    if (const int64_t name = sample_.name(id); name >= 0) names.push_back(name);
  }
  count_sample(names);
  lru_.use(names);
  for (MissSimulator& simulator : simulators_) simulator.know(names);
}

template void TableProfiler::push<int32_t>(std::span<const int32_t>);
template void TableProfiler::push<int64_t>(std::span<const int64_t>);

void TableProfiler::finish() {
  for (MissSimulator& simulator : simulators_) simulator.finish();
}

void TableProfiler::count_sample(std::span<const int64_t> names) {
  const auto batch = static_cast<uint32_t>(counts_.batches);
  SampleCounts& s = sample_counts_;
  for (const int64_t name : names) {
    ++uses_[static_cast<size_t>(name)];
    uint32_t& last = last_batch_[static_cast<size_t>(name)];
    if (last == batch) continue;
    const size_t reuse = last == 0 ? kReuseClasses - 1 : static_cast<size_t>(std::bit_width(batch - last - 1));
    ++s.reuse[std::min(reuse, kReuseClasses - 1)];
    for (Groups* g : {&s.of_1, &s.of_4, &s.of_16, &s.windows}) {
      const int64_t now = (batch - 1) / g->batches, before = last == 0 ? -2 : (last - 1) / g->batches;
      if (before == now) continue;
      ++g->unique_rows_so_far;
      g->fresh_rows_so_far += now > 0 && before != now - 1;
    }
    last = batch;
  }
  for (Groups* g : {&s.of_1, &s.of_4, &s.of_16, &s.windows}) {
    if (batch % g->batches != 0) continue;
    g->complete = batch / g->batches;
    g->unique_rows = g->unique_rows_so_far;
    g->fresh_rows = g->fresh_rows_so_far;
  }
}

}  // namespace mtrains
