// RowSample: a share of a table's rows, drawn by hashing, so that all uses of a row are in the sample or none (spatial sampling: SHARDS,
// Waldspurger et al., FAST 2015).
//
// A keyed permutation of [0, rows) decides: the sample are the rows that it sends below `sampled`, and where it sends them is what they
// are called in the sample. So the sample has exactly as many rows as asked for, its names are dense, and nothing is stored.
// The permutation is a Feistel network over a grid of high × low >= rows cells; the cells beyond `rows` walk on until they are inside.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string>

#include "errors.h"

namespace mtrains {

class RowSample {
 public:
  RowSample(int64_t rows, int64_t sampled, uint64_t seed) : rows_(static_cast<uint64_t>(rows)), sampled_(static_cast<uint64_t>(sampled)) {
    if (rows < 1 || sampled < 1 || sampled > rows) {
      throw Error(ErrorKind::kConfiguration, "a sample has 1 to all rows of a table, got " + std::to_string(sampled) + " of " + std::to_string(rows));
    }
    low_ = static_cast<uint64_t>(std::sqrt(static_cast<double>(rows_)));
    while (low_ * low_ < rows_) ++low_;
    high_ = (rows_ + low_ - 1) / low_;
    for (uint64_t& key : keys_) key = mix(seed += 0x9E3779B97F4A7C15);
  }

  int64_t sampled() const { return static_cast<int64_t>(sampled_); }

  // The row's name in the sample, or -1: it is not in it.
  int64_t name(int64_t row) const {
    if (sampled_ == rows_) return row;
    uint64_t at = static_cast<uint64_t>(row);
    do at = permuted(at);
    while (at >= rows_);
    return at < sampled_ ? static_cast<int64_t>(at) : -1;
  }

 private:
  // splitmix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
  static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
  }
  // [0, range) of 32 hashed bits.
  static uint64_t drawn(uint64_t half, uint64_t key, uint64_t range) { return (mix(half ^ key) >> 32) * range >> 32; }

  uint64_t permuted(uint64_t at) const {
    uint64_t high = at / low_, low = at - high * low_;
    for (size_t r = 0; r < keys_.size(); r += 2) {
      low += drawn(high, keys_[r], low_);
      if (low >= low_) low -= low_;
      high += drawn(low, keys_[r + 1], high_);
      if (high >= high_) high -= high_;
    }
    return high * low_ + low;
  }

  uint64_t rows_, sampled_, low_, high_;
  std::array<uint64_t, 4> keys_;
};

}  // namespace mtrains
