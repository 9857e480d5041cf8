// LruCurve: the misses of LRU caches of many sizes at once, exact, from stack distances (Mattson et al., 1970).
//
// A cache holds the rows used last, and all rows of a batch at once: it is looked up before it changes. So a row of a batch is missing from
// every cache whose size is not above its distance, the number of rows used after its last use, in the order of last uses within a
// batch too.
//
//   time_of_[row]    when it was used last, 1, 2, …; 0: never.   row_at_[time]  the row, where that is still its last use, or -1.
//   newer_           a Fenwick tree over times: how many of row_at_ up to a time are rows.
// When times run out, the rows get new ones in the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace mtrains {

class LruCurve {
 public:
  LruCurve(int64_t rows, std::vector<int64_t> sizes);  // sizes rise
  void use(std::span<const int64_t> batch);
  std::vector<int64_t> misses() const;  // by size, of all batches together

 private:
  int32_t used_up_to(int32_t time) const;
  void add(int32_t time, int32_t change);
  void renumber();

  std::vector<int64_t> sizes_;
  std::vector<int64_t> too_small_;  // [k]: uses that the first k sizes missed and the others did not
  std::vector<int32_t> time_of_, row_at_, newer_;
  std::vector<uint32_t> seen_;  // by row: twice the batch that was met last, and one more in its second pass
  std::vector<int64_t> last_uses_;
  int32_t clock_ = 0, rows_used_ = 0;
  uint32_t pass_ = 0;
};

}  // namespace mtrains
