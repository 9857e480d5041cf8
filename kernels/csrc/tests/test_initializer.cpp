// The golden values are those of the Python twin (kernels/deferred_init.py):
//   UniformInit(7, -1.0, 1.0, columns=4).materialize(0, 3)
//   UniformInit(0x0123456789ABCDEF, -0.125, 0.25, 1000, 64, 4, "float16").materialize(row, 1) for rows 0 and 2**31
#include "initializer.h"

#include <array>
#include <cstring>

#include "check.h"

namespace mtrains::test {
namespace {

TEST("initial values in fp32 are the Python twin's, with zeros after the weights") {
  const Initializer init{false, 7, -1.0f, 1.0f, 0, {{0, 4}}, WeightType::kFloat32};
  constexpr uint32_t kWant[3][4] = {{0x3ee2d308, 0x3e994c14, 0x3dca3cb0, 0x3e557908},
                                    {0x3c953f40, 0x3f00a58a, 0x3f4e3350, 0x3f3308b6},
                                    {0x3e6426e0, 0x3f6bbba0, 0xbee31f64, 0xbe935860}};
  for (int64_t row = 0; row < 3; ++row) {
    std::array<std::byte, 24> payload;
    payload.fill(std::byte{0xAA});
    init.fill(row, payload.data(), 20);
    std::array<uint32_t, 6> words;
    std::memcpy(words.data(), payload.data(), sizeof words);
    for (size_t c = 0; c < 4; ++c) CHECK_EQ(words[c], kWant[row][c]);
    CHECK_EQ(words[4], 0u);
    CHECK_EQ(words[5], 0xAAAAAAAAu);
  }
}

TEST("initial values in fp16 are the Python twin's, and depend on the global row and column") {
  const Initializer init{false, 0x0123456789ABCDEF, -0.125f, 0.25f, 1000, {{64, 4}}, WeightType::kFloat16};
  const auto values = [](const Initializer& of, int64_t row) {
    std::array<std::byte, 8> payload;
    of.fill(row, payload.data(), 8);
    std::array<uint16_t, 4> halves;
    std::memcpy(halves.data(), payload.data(), 8);
    return halves;
  };
  CHECK((values(init, 0) == std::array<uint16_t, 4>{0x31c9, 0x31d7, 0x327d, 0x2808}));
  CHECK((values(init, int64_t{1} << 31) == std::array<uint16_t, 4>{0xa356, 0x30a3, 0x3205, 0x2c28}));
  Initializer shard = init;
  shard.first_row += 17;
  CHECK(values(shard, 3) == values(init, 20));
  shard = init;
  shard.columns = {{65, 1}, {64, 1}, {66, 2}};
  const std::array<size_t, 4> columns{1, 0, 2, 3};
  for (size_t c = 0; c < 4; ++c) CHECK_EQ(values(shard, 5)[c], values(init, 5)[columns[c]]);
}

TEST("a fp16 initial value is the nearest one, ties to even, down to subnormals and up to infinity") {
  const auto half = [](float value) {  // low == high: every u gives `value`
    const Initializer init{false, 1, value, value, 0, {{0, 1}}, WeightType::kFloat16};
    std::array<std::byte, 2> payload;
    init.fill(0, payload.data(), 2);
    uint16_t bits;
    std::memcpy(&bits, payload.data(), 2);
    return bits;
  };
  CHECK_EQ(half(0.0f), 0x0000);
  CHECK_EQ(half(1.0f), 0x3C00);
  CHECK_EQ(half(-2.0f), 0xC000);
  CHECK_EQ(half(1.0f + 0x1p-11f), 0x3C00);            // halfway, to even
  CHECK_EQ(half(1.0f + 3 * 0x1p-11f), 0x3C02);        // halfway, to even
  CHECK_EQ(half(1.0f + 0x1p-11f + 0x1p-20f), 0x3C01);
  CHECK_EQ(half(65504.0f), 0x7BFF);
  CHECK_EQ(half(0x1p-24f), 0x0001);
  CHECK_EQ(half(0x1p-25f), 0x0000);                   // halfway to the least subnormal, to even
  CHECK_EQ(half(0x1.8p-25f), 0x0001);
  CHECK_EQ(half(0x1p-14f - 0x1p-26f), 0x0400);        // rounds up into the normal numbers
}

TEST("a table without initial values is zeros") {
  std::array<std::byte, 9> payload;
  payload.fill(std::byte{0xAA});
  Initializer{}.fill(5, payload.data(), 8);
  for (size_t i = 0; i < 8; ++i) CHECK(payload[i] == std::byte{0});
  CHECK(payload[8] == std::byte{0xAA});
}

}  // namespace
}  // namespace mtrains::test
