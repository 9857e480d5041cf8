#include "record_cache.h"

#include <algorithm>
#include <stdexcept>

#include "errors.h"

namespace mtrains {

namespace {

constexpr size_t kFlushRows = 4096;  // put into the home at a time; guess

int32_t rows_of(const CacheSpec& spec, const TableSpec& table) {
  if (spec.rows < 1) {
    throw Error(ErrorKind::kConfiguration,
                "a cache of table '" + table.name + "' must have at least one row, got " + std::to_string(spec.rows));
  }
  return static_cast<int32_t>(std::min<int64_t>({spec.rows, table.row_count, INT32_MAX - 1}));
}

std::variant<LazyArray<std::byte>, Mapping> memory_of(const CacheSpec& spec, uint64_t bytes) {
  if (spec.folder.empty()) return LazyArray<std::byte>(bytes);
  return map_unnamed_file(spec.system ? *spec.system : System::real(), spec.folder, bytes);
}

}  // namespace

RecordCache::RecordCache(const CacheSpec& spec, const TableSpec& table, uint32_t batch_limit)
    : record_bytes_(table.record_bytes), batch_limit_(batch_limit), directory_(table.row_count, rows_of(spec, table)),
      memory_(memory_of(spec, static_cast<uint64_t>(directory_.pool_rows()) * table.record_bytes)),
      records_(std::visit([](auto& memory) { return memory.data(); }, memory_)) {}

void RecordCache::count_reads(int64_t hits, int64_t misses) {
  stats_.hits += hits;
  stats_.misses += misses;
  stats_.read_bytes += hits * record_bytes_;
}

Stamp RecordCache::next_stamp(bool dirty) {
  if (batch_ + 1 >= batch_limit_) {  // the oldest half become equally old
    const uint32_t shift = batch_ - batch_ / 2;
    directory_.age(shift);
    batch_ -= shift;
    base_ += shift;
  }
  return Stamp::of(++batch_, dirty);
}

void RecordCache::insert(std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts, bool dirty,
                         const Below& below) {
  for (size_t first = 0; first < rows.size(); first += this->rows()) {
    const size_t count = std::min(this->rows(), rows.size() - first);
    insert_some(rows.subspan(first, count), slots.subspan(first, count), parts, dirty, below);
  }
}

void RecordCache::insert_some(std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts, bool dirty,
                              const Below& below) {
  const Stamp stamp = next_stamp(dirty);
  places_.resize(rows.size());
  directory_.lookup(rows.data(), 0, static_cast<int64_t>(rows.size()), stamp, 0, places_.data());
  try {
    if (!directory_.reserve(UINT32_MAX, stamp, nullptr)) throw std::logic_error("record cache: no room for fewer rows than it has");
    evict(true, below);
    evict(false, below);
  } catch (...) {
    directory_.rollback();
    throw;
  }
  directory_.commit(stamp, places_.data());
  for (size_t i = 0; i < rows.size(); ++i) gather_record(parts, slots[i], record(static_cast<int32_t>(places_[i])));
  stats_.inserted_rows += static_cast<int64_t>(rows.size());
  stats_.written_bytes += static_cast<int64_t>(rows.size() * record_bytes_);
}

void RecordCache::evict(bool dirty, const Below& below) {
  leaving_rows_.clear();
  leaving_slots_.clear();
  for (const int32_t slot : directory_.reserved_slots()) {
    if (directory_.row_of_slot(slot) < 0 || directory_.dirty(slot) != dirty) continue;
    leaving_rows_.push_back(directory_.row_of_slot(slot));
    leaving_slots_.push_back(slot);
  }
  if (leaving_rows_.empty()) return;
  below(leaving_rows_, leaving_slots_, parts(), dirty);
  if (dirty) stats_.write_backs += static_cast<int64_t>(leaving_rows_.size());
}

void RecordCache::drop_row(int64_t row) {
  if (const int32_t slot = slot_of_row(row); slot >= 0) drop(slot);
}

void RecordCache::flush(const Below& home) {
  std::vector<int32_t> dirty;
  for (int32_t slot = 0; slot < directory_.pool_rows(); ++slot) {
    if (directory_.dirty(slot)) dirty.push_back(slot);
  }
  directory_.sort_by_use(dirty);
  for (size_t first = 0; first < dirty.size(); first += kFlushRows) {
    leaving_slots_.assign(dirty.begin() + static_cast<std::ptrdiff_t>(first),
                          dirty.begin() + static_cast<std::ptrdiff_t>(std::min(first + kFlushRows, dirty.size())));
    leaving_rows_.clear();
    for (const int32_t slot : leaving_slots_) leaving_rows_.push_back(directory_.row_of_slot(slot));
    home(leaving_rows_, leaving_slots_, parts(), true);
    for (const int32_t slot : leaving_slots_) directory_.mark_clean(slot);
    stats_.flushed_rows += static_cast<int64_t>(leaving_rows_.size());
  }
}

void RecordCache::forget() {
  for (int32_t slot = 0; slot < directory_.pool_rows(); ++slot) {
    if (directory_.row_of_slot(slot) >= 0) drop(slot);
  }
}

CacheStats RecordCache::stats() const {
  CacheStats s = stats_;
  s.rows = directory_.pool_rows();
  s.resident_rows = directory_.resident();
  s.evictions = directory_.evictions();
  return s;
}

}  // namespace mtrains
