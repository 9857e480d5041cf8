// Index snapshot: where the newest record of every row was at a checkpoint, so that opening replays only what came later.
//
//   snapshot  magic "MTRIDX\r\n" | version u32 | volume id 16 bytes | epoch u64 | crc32c u32 | page* | end
//   page      table u32 | entries u32 | first row u64 | place u64 × entries | crc32c u32 of the page before it
//   end       a page of table 0 without entries
//
// A place is a packed Place (log_format.h), 0 for a row never put. Pages without any place are left out.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "log_format.h"
#include "volume_folder.h"

namespace mtrains {

class IndexSnapshotWriter {
 public:
  IndexSnapshotWriter(File file, std::string name, const VolumeId& volume, uint64_t epoch);
  void page(uint32_t table, uint64_t first_row, std::span<const uint64_t> places);
  uint64_t finish();  // durable; returns its bytes

 private:
  void append(const void* data, size_t n);
  void write_out();

  File file_;
  std::string name_;
  std::vector<std::byte> buffer_;
  uint64_t written_ = 0;
};

using SnapshotPage = std::function<void(uint32_t table, uint64_t first_row, std::span<const uint64_t> places)>;

// Throws kDamagedRecord for anything but a whole snapshot of that volume and epoch.
void read_index_snapshot(const File& file, const std::string& name, const VolumeId& volume, uint64_t epoch, const SnapshotPage& page);

}  // namespace mtrains
