#include <vector>

#include "check.h"
#include "crc32c.h"

namespace mtrains::test {
namespace {

std::vector<uint8_t> bytes_of(Random& random, size_t n) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
  return bytes;
}

TEST("crc32c gives the values of RFC 3720, B.4") {
  std::vector<uint8_t> bytes(32, 0);
  CHECK_EQ(crc32c(0, bytes.data(), 32), 0x8A9136AAu);
  bytes.assign(32, 0xFF);
  CHECK_EQ(crc32c(0, bytes.data(), 32), 0x62A8AB43u);
  for (uint8_t i = 0; i < 32; ++i) bytes[i] = i;
  CHECK_EQ(crc32c(0, bytes.data(), 32), 0x46DD794Eu);
  for (uint8_t i = 0; i < 32; ++i) bytes[i] = static_cast<uint8_t>(31 - i);
  CHECK_EQ(crc32c(0, bytes.data(), 32), 0x113FDB5Cu);
  CHECK_EQ(crc32c(0, "123456789", 9), 0xE3069283u);
  CHECK_EQ(crc32c(0, nullptr, 0), 0u);
}

TEST("crc32c by table and by instruction are equal at every length and alignment") {
  Random random = fresh_random();
  const std::vector<uint8_t> bytes = bytes_of(random, 300);
  for (size_t begin = 0; begin < 16; ++begin) {
    for (size_t n = 0; begin + n <= bytes.size(); ++n) {
      const auto before = static_cast<uint32_t>(random());
      CHECK_EQ(crc32c(before, bytes.data() + begin, n), crc32c_by_table(before, bytes.data() + begin, n));
    }
  }
}

TEST("crc32c of two pieces is that of the whole") {
  Random random = fresh_random();
  const std::vector<uint8_t> bytes = bytes_of(random, 100);
  const uint32_t whole = crc32c(0, bytes.data(), bytes.size());
  for (size_t n = 0; n <= bytes.size(); ++n) {
    CHECK_EQ(crc32c(crc32c(0, bytes.data(), n), bytes.data() + n, bytes.size() - n), whole);
  }
}

}  // namespace
}  // namespace mtrains::test
