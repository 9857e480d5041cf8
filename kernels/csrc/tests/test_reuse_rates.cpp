#include "reuse_rates.h"

#include <cmath>
#include <vector>

#include "check.h"

namespace mtrains::test {
namespace {

// A table of which every row is used with a probability of its own in every batch; its rows' paces and last uses.
class Law {
 public:
  Law(Random& random, std::vector<double> use) : random_(random), use_(std::move(use)), pace_(use_.size(), ReuseRates::kUnused), last_(use_.size()) {}

  void batch() {
    rates.advance_to(++now_);
    for (size_t row = 0; row < use_.size(); ++row) {
      if (std::uniform_real_distribution()(random_) >= use_[row]) continue;
      pace_[row] = rates.used(pace_[row], now_ - last_[row]);
      last_[row] = now_;
    }
  }
  uint32_t pace(size_t row) const { return pace_[row]; }

  ReuseRates rates;

 private:
  Random& random_;
  std::vector<double> use_;
  std::vector<uint32_t> pace_, last_;
  uint32_t now_ = 0;
};

TEST("bins are quarters of octaves of batches") {
  CHECK_EQ(ReuseRates::bin(1), 0u);
  CHECK_EQ(ReuseRates::bin(2), 4u);
  CHECK_EQ(ReuseRates::bin(3), 6u);
  CHECK_EQ(ReuseRates::bin(8), 12u);
  CHECK_EQ(ReuseRates::bin(9), 12u);
  CHECK_EQ(ReuseRates::bin(10), 13u);
  CHECK_EQ(ReuseRates::bin(16'384), 56u);
  CHECK_EQ(ReuseRates::bin(UINT32_MAX), ReuseRates::kBins - 1);
  for (uint32_t batches = 1; batches < 100'000; ++batches) CHECK(ReuseRates::bin(batches) <= ReuseRates::bin(batches + 1));
}

TEST("what was never used has come once, then has the pace of its first interval, and moves three eighths of the way to later ones") {
  ReuseRates rates;
  CHECK_EQ(rates.used(ReuseRates::kUnused, 7), ReuseRates::kOnce);
  CHECK_EQ(rates.used(ReuseRates::kOnce, 16), 16u);
  CHECK_EQ(rates.used(16, 256), 22u);  // 16 + 3/8 × (32 - 16)
  CHECK_EQ(rates.used(22, 256), 26u);
  CHECK_EQ(rates.used(30, 1), 19u);
  CHECK_EQ(rates.used(ReuseRates::kOnce, UINT32_MAX), ReuseRates::kSlowest);
}

TEST("rows that are used at an even rate have that rate, whatever their pace and age") {
  Random random = fresh_random();
  Law law(random, std::vector<double>(4000, 0.05));
  for (int batch = 0; batch < 1600; ++batch) law.batch();
  for (const uint32_t batches : {4u, 10u, 20u, 40u}) {
    const uint32_t of_class = ReuseRates::class_of(ReuseRates::bin(batches));
    for (const uint32_t age : {1u, 5u, 20u}) CHECK(std::abs(law.rates.rate(of_class, age) / 0.05 - 1) < 0.4);  // few wait longer
  }
}

TEST("of rows that are used often and such that are used once, the rate is that of those still waiting") {
  Random random = fresh_random();
  std::vector<double> use(20'000, 0.0005);
  for (size_t row = 0; row < 500; ++row) use[row] = 0.25;
  Law law(random, use);
  for (int batch = 0; batch < 1600; ++batch) law.batch();
  const auto rate = [&](uint32_t batches, uint32_t age) { return law.rates.rate(ReuseRates::class_of(ReuseRates::bin(batches)), age); };
  CHECK(std::abs(rate(4, 1) / 0.25 - 1) < 0.1);
  CHECK(rate(4, 100) < 0.01);  // a row of that pace that has not come for so long is one of the others
  CHECK(rate(1000, 100) < 0.002);
  CHECK(rate(1000, 100) > 0.0003);
}

TEST("rows that came in every batch, and later in every tenth, are known for that") {
  ReuseRates rates;
  constexpr uint32_t kBatches = 2000;
  std::vector<uint32_t> paces(1000, ReuseRates::kUnused);
  for (uint32_t batch = 1; batch <= kBatches; ++batch) {
    rates.advance_to(batch);
    for (uint32_t& pace : paces) pace = rates.used(pace, 1);
  }
  CHECK(rates.rate(0, 1) > 0.9F);
  for (uint32_t batch = kBatches + 1; batch <= 2 * kBatches; ++batch) {
    rates.advance_to(batch);
    if (batch % 10 == 0) {
      for (uint32_t& pace : paces) pace = rates.used(pace, 10);
    }
  }
  const uint32_t of_class = ReuseRates::class_of(paces[0]);
  CHECK(rates.rate(of_class, 1) < 0.05F);
  CHECK(rates.rate(of_class, 10) > 0.1F);  // its octave has ages at which none comes
}

TEST("batches without a use of the table, and numbers that begin anew, change no more than the age of what waits") {
  ReuseRates rates;
  rates.advance_to(1);
  CHECK_EQ(rates.used(ReuseRates::kUnused, 0), ReuseRates::kOnce);
  rates.advance_to(3'000'000'000u);
  CHECK_EQ(rates.now(), 3'000'000'000u);
  rates.renumber(2'999'999'990u);
  CHECK_EQ(rates.now(), 10u);
  rates.advance_to(11);
  CHECK(rates.rate(0, 1) >= 0);
}

}  // namespace
}  // namespace mtrains::test
