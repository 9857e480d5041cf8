#include "check.h"
#include "log_format.h"

namespace mtrains::test {
namespace {

TEST("a block of every record size is pages, holds whole records and wastes at most an eighth where it can") {
  for (uint32_t bytes = 1; bytes <= (1u << 20); bytes += bytes < 70'000 ? 1 : 997) {
    const BlockShape shape = BlockShape::of(bytes);
    CHECK(shape.stride_bytes >= kRecordHeaderBytes + bytes && shape.stride_bytes % 8 == 0);
    CHECK(shape.stride_bytes < kRecordHeaderBytes + bytes + 8);
    CHECK(shape.block_bytes % kPageBytes == 0);
    CHECK_EQ(shape.records, shape.block_bytes / shape.stride_bytes);
    CHECK(shape.records >= 1 && shape.records <= (1u << 15));
    const uint32_t least = (shape.stride_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    const bool thrifty = shape.block_bytes % shape.stride_bytes <= shape.block_bytes / 8;
    CHECK(thrifty || shape.block_bytes == std::max(least, kMostBlockBytes));
    for (uint32_t smaller = least; smaller < shape.block_bytes; smaller += kPageBytes) {
      CHECK(smaller % shape.stride_bytes > smaller / 8);
    }
  }
}

TEST("a place survives packing and is never taken for an open block or for nothing") {
  Random random = fresh_random();
  for (int i = 0; i < 10'000; ++i) {
    const bool last = i == 0;
    const Place p{last ? kMostSegments - 1 : static_cast<uint32_t>(1 + below(random, kMostSegments - 1)),
                  last ? (1u << 20) - 1 : static_cast<uint32_t>(below(random, 1u << 20)),
                  last ? (1u << 15) - 1 : static_cast<uint32_t>(below(random, 1u << 15))};
    const uint64_t bits = p.pack();
    CHECK(bits != 0 && bits >> 63 == 0);
    const Place q = Place::unpack(bits);
    CHECK(q.segment == p.segment && q.block == p.block && q.position == p.position);
  }
}

TEST("a record's checksum is another one at another place, and for any flipped bit but the checksum's own") {
  std::vector<std::byte> record(kRecordHeaderBytes + 20);
  for (size_t i = 0; i < record.size(); ++i) record[i] = static_cast<std::byte>(i * 37);
  const uint64_t place = Place{3, 5, 7}.pack();
  const uint32_t crc = record_crc(record.data(), 20, place);
  CHECK(crc != record_crc(record.data(), 20, Place{3, 5, 8}.pack()));
  CHECK(crc != record_crc(record.data(), 20, Place{3, 6, 7}.pack()));
  CHECK(crc != record_crc(record.data(), 20, Place{4, 5, 7}.pack()));
  for (size_t bit = 0; bit < 8 * record.size(); ++bit) {
    record[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    CHECK((crc == record_crc(record.data(), 20, place)) == (bit < 32));
    record[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
  }
}

}  // namespace
}  // namespace mtrains::test
