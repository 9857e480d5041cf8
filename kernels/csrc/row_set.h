// RowSet: a set of rows of one table, one bit a row. Rows never added cost nothing.
//
// Threads may change it while others look; these see a row that comes or goes as it was or as it is.
#pragma once

#include <atomic>
#include <cstdint>

#include "lazy_array.h"

namespace mtrains {

class RowSet {
 public:
  explicit RowSet(int64_t rows) : rows_(rows), words_(static_cast<size_t>((rows + 63) / 64)) {}

  int64_t rows() const { return rows_; }
  void add(int64_t row) { word(row).fetch_or(bit(row), std::memory_order_relaxed); }
  void remove(int64_t row) { word(row).fetch_and(~bit(row), std::memory_order_relaxed); }
  bool contains(int64_t row) const {  // of any number, rows that the table does not have included
    return row >= 0 && row < rows_ && (word(row).load(std::memory_order_relaxed) & bit(row));
  }

 private:
  static uint64_t bit(int64_t row) { return uint64_t{1} << (row & 63); }
  std::atomic_ref<uint64_t> word(int64_t row) const { return std::atomic_ref(words_[static_cast<size_t>(row) / 64]); }

  int64_t rows_;
  mutable LazyArray<uint64_t> words_;
};

}  // namespace mtrains
