// RecordCache: some records of one table, whole and in place, in host memory or in a mapped file.
//
//   directory_   row → slot, and per slot a stamp: the insertion that brought its record, and whether the tier below has
//                that value (clean) or not (dirty). 4 bytes a row of the table, mapped lazily, and 16 a slot.
//   records_     one record a slot, back to back. Host memory is mapped lazily; a mapped file is taken at once.
//
// The cache is exclusive: records enter when they leave the tier above, and are given back when that tier takes them. So it
// never holds what is above it, a read does not touch the order, and what is learned of a row is after how many insertions it is
// inserted again (reuse_rates.h). Evicted records go to the tier below, which need not keep the clean ones.
//
// Not thread-safe: CachedVolume locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "lazy_array.h"
#include "mapped_file.h"
#include "slot_directory.h"
#include "volume.h"

namespace mtrains {

struct CacheSpec {
  int64_t rows;
  std::string folder;  // of a byte-addressable device; empty: host memory
  std::shared_ptr<System> system;  // that opens it; null: the real one
};

struct CacheStats {
  int64_t rows = 0, resident_rows = 0;
  int64_t hits = 0, misses = 0;  // rows that reads asked it for
  int64_t inserted_rows = 0;
  int64_t evictions = 0;
  int64_t write_backs = 0;   // of these, dirty: put into the tier below
  int64_t flushed_rows = 0;  // put into the home by flush, and kept
  int64_t read_bytes = 0, written_bytes = 0;
};

class RecordCache {
 public:
  // Takes records that leave the cache; throws when it cannot, and the cache then keeps them.
  using Below = std::function<void(std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts, bool dirty)>;

  RecordCache(const CacheSpec& spec, const TableSpec& table, uint32_t batch_limit);

  size_t rows() const { return static_cast<size_t>(directory_.pool_rows()); }  // room
  void prefetch(int64_t row) const { directory_.prefetch(row); }
  int32_t slot_of_row(int64_t row) const { return directory_.slot_of_row(row); }  // -1: not here
  std::byte* record(int32_t slot) const { return records_ + static_cast<uint64_t>(slot) * record_bytes_; }
  bool holds(int32_t slot, uint64_t insertion) const { return directory_.row_of_slot(slot) >= 0 && this->insertion(slot) == insertion; }
  uint64_t insertion(int32_t slot) const { return base_ + directory_.batch_of_slot(slot); }

  void count_reads(int64_t hits, int64_t misses);
  void insert(std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts, bool dirty, const Below& below);
  void keep(int32_t slot) { directory_.touch(slot, batch_); }  // it left the tier above again, unchanged
  void drop(int32_t slot) { directory_.drop(slot); }
  void drop_row(int64_t row);
  void flush(const Below& home);  // every record is clean afterwards
  void forget();
  CacheStats stats() const;
  void check() const { directory_.check(); }

 private:
  Stamp next_stamp(bool dirty);
  void insert_some(std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts, bool dirty, const Below& below);
  void evict(bool dirty, const Below& below);
  std::vector<Part> parts() const { return {{records_, record_bytes_, record_bytes_}}; }

  const uint32_t record_bytes_, batch_limit_;
  SlotDirectory directory_;
  std::variant<LazyArray<std::byte>, Mapping> memory_;
  std::byte* const records_;
  uint32_t batch_ = 0;  // of the last insertion; stamps count from base_
  uint64_t base_ = 0;
  CacheStats stats_;
  std::vector<int64_t> places_, leaving_rows_;  // of one insertion
  std::vector<int32_t> leaving_slots_;
};

}  // namespace mtrains
