// CheckedBatch: the ids of one batch, feature by feature, each known to be a row of its feature's table.
//
// Feature f holds ids[offsets[f * stride]] up to ids[offsets[(f + 1) * stride]]; bounds[f] and bounds[f + 1] are those places. The ids
// belong to the caller, and must outlive this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mtrains {

struct Batch {
  const void* ids;
  bool ids_are_int32;
  const void* offsets;
  bool offsets_are_int32;
  int64_t stride;
  int64_t id_count;
};

struct CheckedBatch {
  Batch batch;
  std::vector<int64_t> bounds;

  // with_ids(ids, begin, end): the feature's ids are ids[begin, end), ids a pointer to int32_t or int64_t.
  template <class Do>
  void of_feature(size_t f, Do&& with_ids) const {
    if (batch.ids_are_int32) {
      with_ids(static_cast<const int32_t*>(batch.ids), bounds[f], bounds[f + 1]);
    } else {
      with_ids(static_cast<const int64_t*>(batch.ids), bounds[f], bounds[f + 1]);
    }
  }
  // with_ids(feature, ids, begin, end), feature by feature.
  template <class Do>
  void by_feature(Do&& with_ids) const {
    for (size_t f = 0; f + 1 < bounds.size(); ++f) {
      of_feature(f, [&](const auto* ids, int64_t begin, int64_t end) { with_ids(f, ids, begin, end); });
    }
  }
};

// What a feature's ids are rows of.
struct FeatureTable {
  std::string name;
  int64_t rows;
};

// Throws kConfiguration for offsets that decrease or leave the ids, kIdOutOfRange for an id that is no row.
CheckedBatch checked(const Batch& batch, const std::vector<FeatureTable>& features);

}  // namespace mtrains
