#include "initializer.h"

#include <cstring>

namespace mtrains {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

uint16_t to_float16(float value) {  // round to nearest even, subnormals and infinities included
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u) return sign | (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u);
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;
  if (magnitude < 0x33000000u) return sign;
  const int exponent = static_cast<int>(magnitude >> 23);
  const bool subnormal = exponent < 113;
  const uint32_t mantissa = subnormal ? ((magnitude & 0x7FFFFFu) | 0x800000u) : magnitude - (112u << 23);
  const int shift = subnormal ? 126 - exponent : 13;
  const uint32_t half = 1u << (shift - 1), rest = mantissa & ((1u << shift) - 1);
  uint32_t result = mantissa >> shift;
  if (rest > half || (rest == half && (result & 1))) ++result;
  return static_cast<uint16_t>(sign | result);
}

size_t bytes_of(WeightType type) { return type == WeightType::kFloat32 ? 4 : 2; }

}  // namespace

uint64_t Initializer::weight_bytes() const {
  uint64_t count = 0;
  for (const ColumnRange& r : columns) count += r.count;
  return count * bytes_of(type);
}

void Initializer::fill(int64_t row, std::byte* payload, uint32_t record_bytes) const {
  if (zero) {
    std::memset(payload, 0, record_bytes);
    return;
  }
  const uint64_t row_key = mix(seed + kGolden * static_cast<uint64_t>(first_row + row + 1));
  const float range = high - low;
  const size_t element_bytes = bytes_of(type);
  std::byte* const end = payload + record_bytes;
  for (const ColumnRange& range_of_columns : columns) {
    for (uint32_t c = 0; c < range_of_columns.count; ++c) {
      const uint64_t key = mix(row_key + kGolden * static_cast<uint64_t>(range_of_columns.first + c + 1));
      const float u = static_cast<float>(static_cast<int32_t>(key >> 40)) * 0x1p-24f;
      const float value = low + u * range;
      if (type == WeightType::kFloat32) {
        std::memcpy(payload, &value, 4);
      } else {
        const uint16_t half = to_float16(value);
        std::memcpy(payload, &half, 2);
      }
      payload += element_bytes;
    }
  }
  std::memset(payload, 0, static_cast<size_t>(end - payload));
}

}  // namespace mtrains
