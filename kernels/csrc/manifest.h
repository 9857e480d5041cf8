// Manifest: what one committed checkpoint of an SSD volume consists of.
//
//   manifest  magic "MTRMAN\r\n" | version u32 | volume id 16 bytes | epoch u64 | next sequence u64 | segment bytes u64
//             | snapshot u64 | path count u32 | table count u32 | table* | segment count u32 | segment* | crc32c u32 of all before
//   table     name length u32 | name | row count i64 | record bytes u32 | initial values
//   initial   zero u8 | type u8 | columns u32 | seed u64 | low f32 | high f32 | first row i64 | first column i64
//   segment   number u32 | path index u32 | block bytes u32 | blocks u32 | records u32 | blocks in the snapshot u32
//             | records in the snapshot u32
//
// Tables are in the order of their numbers, from 1. `snapshot` is the epoch whose index snapshot (index_snapshot.h) stands
// for the blocks that the segments say are in it; 0 for none. Zeros end a block before it is full, so only the number of a segment's
// records tells an end that was wiped from one that was never written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "initializer.h"
#include "log_format.h"
#include "volume.h"

namespace mtrains {

struct ManifestTable {
  TableSpec spec;
  Initializer init;
};

struct ManifestSegment {
  uint32_t number;
  uint32_t path_index;
  uint32_t block_bytes;
  uint32_t blocks;       // those that belong to the checkpoint
  uint32_t records;      // in them
  uint32_t in_snapshot;  // of the blocks, the first that the index snapshot covers
  uint32_t records_in_snapshot;
};

constexpr uint32_t kManifestSegmentBytes = 28;

struct Manifest {
  VolumeId volume{};
  uint64_t epoch = 0;
  uint64_t next_sequence = 1;
  uint64_t segment_bytes = 0;
  uint64_t snapshot = 0;
  uint32_t path_count = 0;
  std::vector<ManifestTable> tables;
  std::vector<ManifestSegment> segments;

  std::vector<std::byte> encode() const;
  // `file` is for messages. Throws kDamagedRecord for bytes that are no manifest, kVolumeMismatch for another version.
  static Manifest decode(const std::vector<std::byte>& bytes, const std::string& file);
};

}  // namespace mtrains
