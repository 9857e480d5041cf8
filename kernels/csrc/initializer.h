// Deferred initial values: a row that was never written has the value of a counter-based generator, so that a terabyte
// table costs nothing until touched and every sharding, device and in-memory twin agrees on every bit.
//
//   key(row, column) = mix(mix(seed + GOLDEN * (row + 1)) + GOLDEN * (column + 1))     64-bit, wrapping
//   u                = (key >> 40) * 2^-24                                             exact in fp32, in [0, 1)
//   value            = low + u * (high - low)                                          two fp32 roundings, no FMA
//
// mix is the finaliser of splitmix64. row and column are global to the unsharded table. An FP16 table rounds the fp32
// value once, to nearest even. Bytes of the record after the weights (optimizer state) are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mtrains {

struct ColumnRange {
  int64_t first = 0;  // global to the unsharded table
  uint32_t count = 0;
  bool operator==(const ColumnRange&) const = default;
};

enum class WeightType : uint8_t { kFloat32 = 0, kFloat16 = 1 };

struct Initializer {
  bool zero = true;            // never-put rows read as zeros; the rest is then unused
  uint64_t seed = 0;
  float low = 0, high = 0;
  int64_t first_row = 0;       // global row of the shard's row 0
  std::vector<ColumnRange> columns;  // of the record's elements, in their order
  WeightType type = WeightType::kFloat32;

  uint64_t weight_bytes() const;
  // Writes the payload of `row` (local to the shard): the columns' weights, then zeros up to record_bytes.
  void fill(int64_t row, std::byte* payload, uint32_t record_bytes) const;
};

}  // namespace mtrains
