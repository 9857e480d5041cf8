// What the log of an SSD volume looks like on disk. All numbers are little-endian.
//
//   segment file   header (4096 bytes), then blocks of one size
//   block          records of one table, each on a stride of its own table; the rest is zeros. Never without a record.
//   record         crc32c u32 | table u32 | row i64 | sequence u64 | payload
//
// The checksum covers the record's place (segment, block, position), its header after the checksum, and its payload: a
// record read from anywhere but its place fails. Tables are numbered from 1, so zeros are no record. Of the records of one
// row, the one with the highest sequence counts.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "crc32c.h"

namespace mtrains {

constexpr uint32_t kFormatVersion = 2;
constexpr uint32_t kPageBytes = 4096;  // alignment of every O_DIRECT transfer
constexpr uint32_t kRecordHeaderBytes = 24;
constexpr uint64_t kLeastSegmentBytes = 128u << 10, kMostSegmentBytes = 64u << 20;
constexpr uint32_t kMostBlockBytes = 64u << 10;  // unless one record is larger

struct RecordHeader {
  uint32_t crc;
  uint32_t table;
  int64_t row;
  uint64_t sequence;
};
static_assert(sizeof(RecordHeader) == kRecordHeaderBytes);

// Where a record is: packed into 63 bits, never 0 (segments are numbered from 1).
struct Place {
  uint32_t segment;   // < 2^28
  uint32_t block;     // < 2^20
  uint32_t position;  // < 2^15

  uint64_t pack() const { return (uint64_t{segment} << 35) | (uint64_t{block} << 15) | position; }
  static Place unpack(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 35), static_cast<uint32_t>(bits >> 15) & 0xFFFFF, static_cast<uint32_t>(bits) & 0x7FFF};
  }
};
constexpr uint32_t kMostSegments = 1u << 28;

// How records of one size lie in blocks: the smallest multiple of a page that wastes at most an eighth.
struct BlockShape {
  uint32_t record_bytes;  // payload
  uint32_t stride_bytes;  // header and payload, on 8 bytes
  uint32_t block_bytes;
  uint32_t records;       // a block

  uint32_t share_bytes() const { return block_bytes / records; }  // what a record takes of its block, waste included

  static BlockShape of(uint32_t record_bytes) {
    const uint32_t stride = (kRecordHeaderBytes + record_bytes + 7) / 8 * 8;
    uint32_t block = (stride + kPageBytes - 1) / kPageBytes * kPageBytes;
    while (block % stride > block / 8 && block + kPageBytes <= kMostBlockBytes) block += kPageBytes;
    return {record_bytes, stride, block, block / stride};
  }
};

inline uint32_t record_crc(const std::byte* record, uint32_t record_bytes, uint64_t place) {
  return crc32c(crc32c(0, &place, 8), record + 4, kRecordHeaderBytes - 4 + record_bytes);
}

inline RecordHeader header_of(const std::byte* record) {
  RecordHeader h;
  std::memcpy(&h, record, sizeof h);
  return h;
}

// What follows the records of a block. A table number that reads as 0 does not end a block alone: it may be a flipped bit.
inline bool is_zeros(const std::byte* begin, const std::byte* end) {
  return std::all_of(begin, end, [](std::byte b) { return b == std::byte{0}; });
}

using VolumeId = std::array<uint8_t, 16>;

struct SegmentHeader {
  std::array<char, 8> magic;
  uint32_t version;
  uint32_t segment;
  uint32_t block_bytes;
  uint32_t path_index;
  VolumeId volume;
  uint32_t crc;  // of everything before it
};
constexpr std::array<char, 8> kSegmentMagic = {'M', 'T', 'R', 'S', 'E', 'G', '\r', '\n'};

}  // namespace mtrains
