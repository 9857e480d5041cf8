// LogTable: a table of a log: where the newest record of each row is, and the blocks that its records go to.
//
// The index has 8 bytes a row, mapped lazily:
//
//   0                     never put: the table's initial value
//   kOpen | i             record i of the open block of puts
//   kOpen | kMoved | i    record i of the open block of survivors
//   a Place               in a sealed block: in a chunk that is still in memory, or on the device
//   kGivenUp              nowhere: its newest value is with the reader that took it (GetRequest::take) and will put it. The
//                         record that was on disk is no longer the newest of its row, so cleaning need not copy it
//
// A block is open until it is full or a flush comes, and its records have no checksums yet: those cover their places.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "initializer.h"
#include "lazy_array.h"
#include "log_format.h"
#include "log_segment.h"
#include "volume.h"

namespace mtrains {

struct LogStream;

struct OpenBlock {
  LogStream* stream;  // where it will go
  uint64_t flag;      // of its entries in the index
  AlignedBytes bytes;
  std::vector<int64_t> rows;
};

struct LogTable {
  static constexpr uint64_t kOpen = uint64_t{1} << 63;
  static constexpr uint64_t kMoved = uint64_t{1} << 62;
  static constexpr uint64_t kGivenUp = ~uint64_t{0};

  TableId id;  // from 1, as on disk
  TableSpec spec;
  Initializer init;
  BlockShape shape;
  LazyArray<uint64_t> index;
  OpenBlock fresh, moved;  // of puts; of survivors

  std::byte* open_record(uint64_t entry) {
    return ((entry & kMoved) ? moved : fresh).bytes.get() + (entry & ~(kOpen | kMoved)) * shape.stride_bytes;
  }
  bool sound(int64_t row, uint64_t place, const std::byte* record) const;  // it is that row's, it belongs there, and it is whole
  std::string describe(const std::string& volume, int64_t row, Place place) const;
  std::string damage(const std::string& volume, int64_t row, Place place) const;
};

}  // namespace mtrains
