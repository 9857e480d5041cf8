// MissSimulator: what slot pools of many sizes would miss of the same batches: SlotPool's directory and eviction order, and the order in
// which it and a training pipeline call them, without records and reads. So its counts are a SlotPool's, to the last miss.
//
//   window_   the batches announced and not looked up, oldest first: `lookahead` of them at most, the one that is looked up next
//             included. Without lookahead it holds the batch of the moment.
//   pools_    a directory each. `outstanding` batches before the one being looked up are pinned, while there is room without them.
//
// A pool that cannot hold the rows of some batch is given up: it could not train. Neighbours that come along with a read are not simulated.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "slot_directory.h"

namespace mtrains {

class MissSimulator {
 public:
  struct Pool {
    std::unique_ptr<SlotDirectory> directory;  // null: given up
    int64_t misses = 0;
    int64_t write_backs = 0;  // every batch trains, so all that leaves has changed
  };

  MissSimulator(int64_t rows, const std::vector<int64_t>& pool_rows, uint32_t lookahead, uint32_t outstanding);

  void know(std::span<const int64_t> batch);  // the next batch; the oldest of the window is looked up when that is full, or there is none
  void finish();                          // no batch comes any more: looks up what the window holds

  uint32_t lookahead() const { return lookahead_; }
  uint64_t looked_up() const { return looked_up_; }
  const std::vector<Pool>& pools() const { return pools_; }
  void check() const;  // tests: throws std::logic_error at a broken invariant of a directory

 private:
  void look_up();
  bool begin(Pool& pool, std::span<const int64_t> ids);
  static uint64_t bit(uint64_t batch) { return uint64_t{1} << (batch % 64); }

  const uint32_t lookahead_, outstanding_;
  std::vector<Pool> pools_;
  std::deque<std::vector<int64_t>> window_;
  std::vector<int64_t> slots_;
  uint64_t looked_up_ = 0;  // batches, which are counted from 1
};

}  // namespace mtrains
