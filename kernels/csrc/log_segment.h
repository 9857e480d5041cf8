// LogSegment: a segment of a log whose volume is open: its file, and what its volume knows of it. log_format.h says what is in the file.
//
// Blocks are handed out in order and never rewritten. Of those handed out, the ones in chunks (log_writer.h) are not on the device yet.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <vector>

#include "log_format.h"
#include "mapped_file.h"
#include "volume_folder.h"

namespace mtrains {

struct FreeBytes {
  void operator()(std::byte* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<std::byte, FreeBytes>;  // on a page

inline AlignedBytes aligned_bytes(size_t bytes) {
  void* p = std::aligned_alloc(kPageBytes, (bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
  if (!p) throw std::bad_alloc();
  return AlignedBytes(static_cast<std::byte*>(p));
}

inline uint64_t block_offset(uint32_t block_bytes, uint32_t block) { return kPageBytes + uint64_t{block} * block_bytes; }

struct LogChunk;  // log_writer.h

struct LogSegment {
  uint32_t number, path, block_bytes, capacity_blocks;
  uint32_t blocks = 0;      // handed out
  uint32_t records = 0;     // in them
  uint64_t live_bytes = 0;  // of newest records
  uint32_t kept = 0;        // manifests that name it
  bool unsynced = false;
  File file;
  Mapping mapping;  // of a mapped medium
  std::vector<LogChunk*> chunks;
};
using LogSegments = std::map<uint32_t, std::shared_ptr<LogSegment>>;  // by number

}  // namespace mtrains
