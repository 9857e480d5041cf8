// MemoryVolume: the reference of the volume protocol, every record in host memory.
//
// A table is one array of row_count × record_bytes and one byte a row that says whether the row was ever put; both are
// mapped lazily, so that rows never put cost nothing. Nothing outlives the process: a checkpoint is a number, and
// restore is refused.
#pragma once

#include <deque>
#include <mutex>

#include "lazy_array.h"
#include "volume.h"

namespace mtrains {

class MemoryVolume final : public Volume {
 public:
  TableId table(const TableSpec& spec, const Initializer& init) override;
  void put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots,
           std::span<const Part> parts) override;
  uint64_t submit_get(std::vector<GetRequest> requests, std::function<void()> ready) override;
  Neighbours wait(uint64_t) override { return {}; }
  void flush() override {}
  void checkpoint(uint64_t epoch) override;
  std::vector<uint64_t> epochs() const override;
  void restore(uint64_t epoch) override;
  VolumeStats stats() const override;
  const char* backend() const override { return "memory"; }
  std::string id() const override { return "memory"; }
  void close() override;

 private:
  struct Table {
    TableSpec spec;
    Initializer init;
    LazyArray<std::byte> records;
    LazyArray<uint8_t> present;
  };

  std::deque<Table> tables_;
  std::vector<uint64_t> epochs_;  // the last one, or none
  VolumeStats stats_;
  bool closed_ = false;
  mutable std::mutex mutex_;
};

}  // namespace mtrains
