// AbsentRows: what is known of rows that are in no slot: those that an announced batch will use, and those that the batch
// being looked up misses. 16 bytes each while there is something to know; a row's directory entry says which is its.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mtrains {

struct AbsentRow {
  uint64_t window;  // as of SlotState
  int32_t miss;     // k + 1: the k-th miss of the batch being looked up; 0: none
  int32_t entry;    // what the directory said of the row before: 0, or its pace and last use
};

class AbsentRows {
 public:
  int32_t add(uint64_t window, int32_t entry) {
    int32_t at = last_free_;
    if (at >= 0) {
      last_free_ = rows_[static_cast<size_t>(at)].miss;
    } else {
      at = static_cast<int32_t>(rows_.size());
      rows_.emplace_back();
    }
    rows_[static_cast<size_t>(at)] = {window, 0, entry};
    ++count_;
    return at;
  }
  void remove(int32_t at) {
    rows_[static_cast<size_t>(at)].miss = last_free_;
    last_free_ = at;
    --count_;
  }
  AbsentRow& operator[](int32_t at) { return rows_[static_cast<size_t>(at)]; }
  const AbsentRow& operator[](int32_t at) const { return rows_[static_cast<size_t>(at)]; }
  const AbsentRow* data() const { return rows_.data(); }
  size_t count() const { return count_; }

 private:
  std::vector<AbsentRow> rows_;  // free ones name the next free one in `miss`
  int32_t last_free_ = -1;
  size_t count_ = 0;
};

}  // namespace mtrains
