#include "memory_volume.h"

#include <algorithm>
#include <cstring>

#include "errors.h"

namespace mtrains {

TableId MemoryVolume::table(const TableSpec& spec, const Initializer& init) {
  std::lock_guard lock(mutex_);
  require_open(closed_, "memory");
  require_valid(spec);
  for (size_t t = 0; t < tables_.size(); ++t) {
    if (tables_[t].spec.name != spec.name) continue;
    require_same_shape(tables_[t].spec, spec, "memory");
    return static_cast<TableId>(t);
  }
  const auto rows = static_cast<size_t>(spec.row_count);
  tables_.push_back({spec, init, LazyArray<std::byte>(rows * spec.record_bytes), LazyArray<uint8_t>(rows)});
  return static_cast<TableId>(tables_.size() - 1);
}

void MemoryVolume::put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots,
                       std::span<const Part> parts) {
  std::lock_guard lock(mutex_);
  require_open(closed_, "memory");
  Table& t = tables_.at(table);
  require_rows(t.spec, rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto row = static_cast<size_t>(rows[i]);
    gather_record(parts, slots[i], t.records.data() + row * t.spec.record_bytes);
    t.present[row] = 1;
  }
  stats_.put_rows += rows.size();
}

uint64_t MemoryVolume::submit_get(std::vector<GetRequest> requests, std::function<void()>) {
  std::lock_guard lock(mutex_);
  require_open(closed_, "memory");
  for (const GetRequest& r : requests) require_rows(tables_.at(r.table).spec, r.rows);
  for (const GetRequest& r : requests) {
    Table& t = tables_[r.table];
    std::vector<std::byte> initial(t.spec.record_bytes);
    for (size_t i = 0; i < r.rows.size(); ++i) {
      const auto row = static_cast<size_t>(r.rows[i]);
      const std::byte* record = t.records.data() + row * t.spec.record_bytes;
      if (!t.present[row]) {
        t.init.fill(r.rows[i], initial.data(), t.spec.record_bytes);
        record = initial.data();
        ++stats_.get_rows_initial;
      }
      scatter_record(record, r.parts, r.slots[i]);
    }
    stats_.get_rows += r.rows.size();
  }
  return 0;
}

void MemoryVolume::checkpoint(uint64_t epoch) {
  std::lock_guard lock(mutex_);
  require_open(closed_, "memory");
  require_newer(epochs_, epoch, "memory");
  epochs_ = {epoch};
  ++stats_.checkpoints;
}

std::vector<uint64_t> MemoryVolume::epochs() const {
  std::lock_guard lock(mutex_);
  return epochs_;
}

void MemoryVolume::restore(uint64_t epoch) {
  throw Error(ErrorKind::kVolume, "a memory volume cannot go back to epoch " + std::to_string(epoch) +
                                      ": it keeps the newest values alone; use an SSD volume for state to return to");
}

VolumeStats MemoryVolume::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

void MemoryVolume::close() {
  std::lock_guard lock(mutex_);
  tables_.clear();
  closed_ = true;
}

}  // namespace mtrains
