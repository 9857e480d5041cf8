#include "manifest.h"

#include <cstring>

#include "check.h"

namespace mtrains::test {
namespace {

Manifest some_manifest(Random& random) {
  Manifest m;
  for (uint8_t& b : m.volume) b = static_cast<uint8_t>(random());
  m.epoch = random();
  m.next_sequence = random();
  m.snapshot = random();
  m.segment_bytes = uint64_t{1} << (20 + below(random, 7));
  m.path_count = static_cast<uint32_t>(1 + below(random, 3));
  for (uint64_t t = below(random, 4); t > 0; --t) {
    ManifestTable& table = m.tables.emplace_back();
    table.spec = {"table " + std::string(below(random, 9), 'x') + std::to_string(t), static_cast<int64_t>(1 + below(random, 1000)),
                  static_cast<uint32_t>(4 * (1 + below(random, 300)))};
    if (random() % 2) {
      const auto columns = static_cast<uint32_t>(1 + below(random, table.spec.record_bytes / 4));
      const uint32_t left = below(random, columns);
      std::vector<ColumnRange> ranges{{3, left}, {1000, columns - left}};
      table.init = {false, random(), -0.5f, 0.25f, 7, ranges, random() % 2 ? WeightType::kFloat16 : WeightType::kFloat32};
    }
  }
  for (uint32_t s = static_cast<uint32_t>(m.tables.empty() ? 0 : below(random, 5)), number = 1; s > 0; --s) {
    number += static_cast<uint32_t>(below(random, 3));
    const BlockShape shape = BlockShape::of(m.tables[below(random, m.tables.size())].spec.record_bytes);
    const auto most = static_cast<uint32_t>((m.segment_bytes - kPageBytes) / shape.block_bytes);
    m.segments.push_back({number++, static_cast<uint32_t>(below(random, m.path_count)), shape.block_bytes,
                          0, 0, 0, 0});
    ManifestSegment& made = m.segments.back();
    made.blocks = static_cast<uint32_t>(below(random, most + 1));
    made.in_snapshot = static_cast<uint32_t>(below(random, made.blocks + 1));
    made.records_in_snapshot = made.in_snapshot * static_cast<uint32_t>(1 + below(random, 2));
    made.records = made.records_in_snapshot + (made.blocks - made.in_snapshot) * static_cast<uint32_t>(1 + below(random, 3));
  }
  return m;
}

void fix_checksum(std::vector<std::byte>& bytes) {
  const uint32_t crc = crc32c(0, bytes.data(), bytes.size() - 4);
  std::memcpy(bytes.data() + bytes.size() - 4, &crc, 4);
}

TEST("a manifest survives encoding") {
  Random random = fresh_random();
  for (int i = 0; i < 200; ++i) {
    const Manifest m = some_manifest(random);
    const std::vector<std::byte> bytes = m.encode();
    const Manifest back = Manifest::decode(bytes, "file");
    CHECK(back.volume == m.volume && back.epoch == m.epoch && back.snapshot == m.snapshot && back.next_sequence == m.next_sequence);
    CHECK(back.segment_bytes == m.segment_bytes && back.path_count == m.path_count);
    CHECK_EQ(back.tables.size(), m.tables.size());
    for (size_t t = 0; t < m.tables.size(); ++t) {
      const ManifestTable &a = m.tables[t], &b = back.tables[t];
      CHECK(a.spec.name == b.spec.name && a.spec.row_count == b.spec.row_count && a.spec.record_bytes == b.spec.record_bytes);
      CHECK(a.init.zero == b.init.zero && a.init.type == b.init.type && a.init.columns == b.init.columns);
      CHECK(a.init.seed == b.init.seed && a.init.low == b.init.low && a.init.high == b.init.high);
      CHECK(a.init.first_row == b.init.first_row);
    }
    CHECK_EQ(back.segments.size(), m.segments.size());
    for (size_t s = 0; s < m.segments.size(); ++s) {
      const ManifestSegment &a = m.segments[s], &b = back.segments[s];
      CHECK(a.number == b.number && a.path_index == b.path_index && a.block_bytes == b.block_bytes && a.blocks == b.blocks && a.in_snapshot == b.in_snapshot);
      CHECK(a.records == b.records && a.records_in_snapshot == b.records_in_snapshot);
    }
    CHECK(back.encode() == bytes);
  }
}

TEST("every flipped bit, every cut and every added byte of a manifest is a typed error") {
  Random random = fresh_random();
  Manifest m = some_manifest(random);
  while (m.tables.empty() || m.segments.empty()) m = some_manifest(random);
  const std::vector<std::byte> good = m.encode();
  const auto is_refused = [](const std::vector<std::byte>& bytes) {
    try {
      Manifest::decode(bytes, "file");
    } catch (const Error& e) {
      return e.kind() == ErrorKind::kDamagedRecord || e.kind() == ErrorKind::kVolumeMismatch;
    }
    return false;
  };
  for (size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    CHECK(is_refused(bytes));
  }
  for (size_t n = 0; n < good.size(); ++n) {
    std::vector<std::byte> bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(n));
    CHECK(is_refused(bytes));
    if (n < 4) continue;
    fix_checksum(bytes);
    CHECK(is_refused(bytes));
  }
  std::vector<std::byte> longer = good;
  longer.push_back({});
  CHECK(is_refused(longer));
  fix_checksum(longer);
  CHECK(is_refused(longer));
}

// What no release writes is refused even under a sound checksum: a bug elsewhere must not become a read out of bounds.
TEST("a manifest whose numbers cannot be is a typed error though its checksum is right") {
  Manifest good;
  good.segment_bytes = 1 << 20;
  good.path_count = 1;
  good.tables.resize(2);
  good.tables[0] = {{"a", 10, 64}, {false, 1, 0.0f, 1.0f, 0, {{0, 16}}, WeightType::kFloat32}};
  good.tables[1] = {{"b", 10, 64}, {}};
  const uint32_t block_bytes = BlockShape::of(64).block_bytes;
  good.segments = {{1, 0, block_bytes, 3, 5, 2, 4}, {2, 0, block_bytes, 0, 0, 0, 0}};
  Manifest::decode(good.encode(), "file");
  const auto refused = [&](auto&& spoil) {
    Manifest bad = good;
    spoil(bad);
    check_error(ErrorKind::kDamagedRecord, [&] { Manifest::decode(bad.encode(), "file"); });
  };
  refused([](Manifest& m) { m.tables[0].init.columns[0].count = 17; });  // more weights than the record has room for
  refused([](Manifest& m) { m.tables[0].init.columns.push_back({99, 0x40000001}); });
  refused([](Manifest& m) { m.tables[0].init.type = static_cast<WeightType>(2); });
  refused([](Manifest& m) { m.tables[1].spec.name = "a"; });
  refused([](Manifest& m) { m.tables[1].spec.name.clear(); });
  refused([](Manifest& m) { m.tables[1].spec.row_count = 0; });
  refused([](Manifest& m) { m.tables[1].spec.record_bytes = (1 << 20) + 1; });
  refused([](Manifest& m) { m.segments[1].number = 1; });
  refused([](Manifest& m) { m.segments[1].number = 0; });
  refused([](Manifest& m) { m.segments[1].number = kMostSegments; });
  refused([](Manifest& m) { m.segments[0].path_index = 1; });
  refused([](Manifest& m) { m.segments[0].block_bytes = 2 * kMostBlockBytes; });  // of no table
  refused([](Manifest& m) { m.segments[0].blocks = (1 << 20) / kPageBytes; });    // beyond the segment's end
  refused([](Manifest& m) { m.segments[0].in_snapshot = 4; });
  refused([](Manifest& m) { m.segments[0].records_in_snapshot = 6; });
  refused([](Manifest& m) { m.segments[0].records_in_snapshot = 1; });  // a block has at least one
  refused([](Manifest& m) { m.segments[0].records = 4; });
  refused([](Manifest& m) { m.segments[0].records = 4 + kPageBytes; });
  refused([](Manifest& m) { m.segment_bytes = 0; });
  refused([](Manifest& m) { m.segment_bytes = uint64_t{1} << 63; });
  refused([](Manifest& m) { m.path_count = 0; });
}

}  // namespace
}  // namespace mtrains::test
