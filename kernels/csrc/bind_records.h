// What the bindings of volumes share: records as arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "volume.h"

namespace mtrains {

using Ids = nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using Records = nanobind::ndarray<uint8_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

inline std::vector<int32_t> counted(size_t n) {
  std::vector<int32_t> slots(n);
  for (size_t i = 0; i < n; ++i) slots[i] = static_cast<int32_t>(i);
  return slots;
}

inline std::vector<Part> as_parts(const Records& records) {
  return {{reinterpret_cast<std::byte*>(records.data()), records.shape(1), static_cast<uint32_t>(records.shape(1))}};
}

}  // namespace mtrains
