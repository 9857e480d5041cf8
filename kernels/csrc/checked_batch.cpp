#include "checked_batch.h"

#include "errors.h"

namespace mtrains {

namespace {

std::vector<int64_t> bounds_of(const Batch& batch, size_t features) {
  std::vector<int64_t> bounds(features + 1);
  for (size_t f = 0; f < bounds.size(); ++f) {
    const size_t at = f * static_cast<size_t>(batch.stride);
    bounds[f] = batch.offsets_are_int32 ? static_cast<const int32_t*>(batch.offsets)[at]
                                        : static_cast<const int64_t*>(batch.offsets)[at];
    const int64_t least = f == 0 ? 0 : bounds[f - 1];
    if (bounds[f] < least || bounds[f] > batch.id_count) {
      throw Error(ErrorKind::kConfiguration, "offsets must not decrease and end within the ids: feature " +
                                                 std::to_string(f) + " begins at " + std::to_string(bounds[f]) +
                                                 " of " + std::to_string(batch.id_count) + " ids");
    }
  }
  return bounds;
}

// Position of the first id outside [0, rows), or -1. An id is bad if it or (rows - 1 - id) is negative: a loop of signs
// alone, which compilers turn into vector instructions.
template <class Index>
int64_t first_out_of_range(const Index* ids, int64_t count, int64_t rows) {
  const auto last = static_cast<uint64_t>(rows - 1);
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
    signs |= id | (last - id);
  }
  if (!(signs >> 63)) return -1;
  for (int64_t i = 0;; ++i) {
    if (static_cast<uint64_t>(static_cast<int64_t>(ids[i])) > last) return i;
  }
}

void check_ids(const CheckedBatch& mine, const std::vector<FeatureTable>& features) {
  mine.by_feature([&](size_t f, const auto* ids, int64_t begin, int64_t end) {
    const FeatureTable& table = features[f];
    const int64_t at = first_out_of_range(ids + begin, end - begin, table.rows);
    if (at < 0) return;
    throw Error(ErrorKind::kIdOutOfRange,
                "id " + std::to_string(ids[begin + at]) + " of table '" + table.name + "' (feature " + std::to_string(f) +
                    " of the group, position " + std::to_string(at) + ") is outside [0, " +
                    std::to_string(table.rows) + "). Nothing was changed. Fix the input, hash ids into range, or set "
                    "bounds_check_mode to WARNING to have them read row 0");
  });
}

}  // namespace

CheckedBatch checked(const Batch& batch, const std::vector<FeatureTable>& features) {
  CheckedBatch mine{batch, bounds_of(batch, features.size())};
  check_ids(mine, features);
  return mine;
}

}  // namespace mtrains
