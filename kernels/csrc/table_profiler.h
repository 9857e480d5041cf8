// TableProfiler: how one table is used, from its batches of ids, as they come.
//
// Of all rows, exact, at 2 bits a row: lookups, by range of rows too; unique rows of a batch and of its first quarter and sixteenth;
// rows used at all. Of a sample of the rows (row_sample.h), at 8 bytes a sampled row: uses, batches since the last use, unique rows of
// several batches, drift. And what pools of several sizes and lookahead windows miss of the sample: miss_simulator.h, lru_curve.h. Pools
// are scaled as the sample is; what they miss is the sample's and is scaled by the reader.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "lru_curve.h"
#include "miss_simulator.h"
#include "row_sample.h"
#include "row_set.h"

namespace mtrains {

class TableProfiler {
 public:
  static constexpr size_t kReuseClasses = 12, kRanges = 64;

  // Of the batches so far.
  struct Counts {
    int64_t batches = 0, lookups = 0, unique_rows = 0, unique_rows_of_quarter = 0, unique_rows_of_sixteenth = 0, used_rows = 0;
    std::array<int64_t, kRanges> lookups_of_range{};
  };
  struct Groups {  // of `batches` batches each, the complete ones
    int64_t batches = 1, complete = 0, unique_rows = 0, unique_rows_so_far = 0;
    int64_t fresh_rows = 0, fresh_rows_so_far = 0;  // of the unique ones, not in the group before; from the second group on
  };
  struct SampleCounts {
    std::array<int64_t, kReuseClasses> reuse{};  // last use 1, 2, 3-4, 5-8, … batches before; the last class: no such
    Groups of_1{1}, of_4{4}, of_16{16}, windows;
  };

  // Throws kConfiguration for sizes that cannot be.
  TableProfiler(int64_t rows, int64_t sampled_rows, uint64_t seed, const std::vector<int64_t>& pool_rows,
                const std::vector<uint32_t>& lookaheads, uint32_t outstanding, int64_t window_batches);

  // Throws kIdOutOfRange, and nothing is changed.
  template <class Index>
  void push(std::span<const Index> ids);
  void finish();  // no batch comes any more: those that wait in lookahead windows are looked up

  const Counts& counts() const { return counts_; }
  const SampleCounts& sample_counts() const { return sample_counts_; }
  const std::deque<MissSimulator>& simulators() const { return simulators_; }  // one a lookahead
  std::vector<int64_t> lru_misses() const { return lru_.misses(); }
  std::span<const uint32_t> uses_of_sample() const { return uses_; }
  const std::vector<int64_t>& scaled_pools() const { return scaled_pools_; }

 private:
  template <class Index>
  int64_t unique(std::span<const Index> ids);
  void count_sample(std::span<const int64_t> names);

  const int64_t rows_;
  const RowSample sample_;
  const std::vector<int64_t> scaled_pools_;
  RowSet in_batch_, used_;
  Counts counts_;
  SampleCounts sample_counts_;
  std::vector<uint32_t> last_batch_, uses_;  // by name in the sample; batches count from 1
  std::deque<MissSimulator> simulators_;
  LruCurve lru_;
};

}  // namespace mtrains
