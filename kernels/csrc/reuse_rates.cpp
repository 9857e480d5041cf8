#include "reuse_rates.h"

#include <cmath>
#include <numeric>

namespace mtrains {

namespace {

// All of these may be twice or half of what they are: misses change by less than 1%.
constexpr uint32_t kBatchesToLearn = 16;
constexpr float kKept = 0.9F;      // of what was counted, from one learning to the next
constexpr float kPrior = 100.0F;   // rows × batches at which a class counts as much as what all classes have at that age
constexpr float kLeast = 1e-3F;    // less is nothing: numbers that fade without end are slow to reckon with
constexpr uint32_t kMostAtOnce = 4096;  // batches without a use of the table; who waited longer is as old as this

struct Widths {
  std::array<uint32_t, ReuseRates::kBins> begin{}, next{}, until{};  // of a bin: its first batch; the next that is not empty; the end of its octave
  std::array<float, ReuseRates::kBins> leave{};  // of its rows, those that are older after a batch; 0: it is empty, or the last
};

Widths widths() {
  Widths w;
  for (uint32_t b = 0; b < ReuseRates::kBins; ++b) {
    w.begin[b] = static_cast<uint32_t>(std::ceil(std::ldexp(1.0 + (b % 4) / 4.0, static_cast<int>(b / 4))));
  }
  for (uint32_t b = 0; b < ReuseRates::kBins; ++b) {
    uint32_t next = b + 1, until = b + 1;
    while (next < ReuseRates::kBins && ReuseRates::bin(w.begin[next]) != next) ++next;
    while (until < ReuseRates::kBins && w.begin[until] < 2 * w.begin[b]) ++until;
    w.next[b] = std::min(next, ReuseRates::kBins - 1);
    w.until[b] = until;
    const bool empty = ReuseRates::bin(w.begin[b]) != b;
    w.leave[b] = empty || next == ReuseRates::kBins ? 0.0F : 1.0F / static_cast<float>(w.begin[next] - w.begin[b]);
  }
  return w;
}

const Widths kWidths = widths();

}  // namespace

ReuseRates::Paces ReuseRates::next_paces() {
  Paces paces{};
  for (uint32_t pace = 0; pace < kRow; ++pace) {
    for (uint32_t at = 0; at < kRow; ++at) {
      const int seen = static_cast<int>(std::min(at, kSlowest)), before = static_cast<int>(pace);
      if (pace <= kSlowest) {
        paces[pace][at] = static_cast<uint8_t>(before + ((3 * (seen - before) + 4) >> 3));  // of logarithms, three eighths of the way
      } else {
        paces[pace][at] = static_cast<uint8_t>(pace < kUnused ? seen : static_cast<int>(kOnce));
      }
    }
  }
  return paces;
}

const ReuseRates::Paces ReuseRates::kNextPace = next_paces();

ReuseRates::ReuseRates() : counts_(std::make_unique<Counts>()), batches_to_learn_(kBatchesToLearn) {}

void ReuseRates::advance_to(uint32_t batch) {
  if (batch == now_) return;
  const uint32_t batches = batch > now_ ? std::min(batch - now_, kMostAtOnce) : 1;
  now_ = batch;
  for (uint32_t b = 0; b < batches; ++b) {
    end_batch();
    if (--batches_to_learn_ > 0) continue;
    batches_to_learn_ = kBatchesToLearn;
    learn();
  }
}

void ReuseRates::end_batch() {
  Counts& n = *counts_;
  for (uint32_t b = kBins; b-- > 0;) {
    ByClass<float>& waiting = n.waiting[b];
    ByClass<float>& older = n.waiting[kWidths.next[b]];  // of the last bin and of empty ones nobody goes there
    const float leave = kWidths.leave[b];
    for (uint32_t c = 0; c <= kClasses; ++c) {
      const auto used = static_cast<float>(n.used[b][c]);
      n.waited[b][c] += waiting[c];
      n.reused[b][c] += used;
      const float rest = waiting[c] - used, left = rest > kLeast ? rest : 0.0F, ages = left * leave;
      waiting[c] = left - ages;
      older[c] += ages;
    }
  }
  for (uint32_t c = 0; c <= kClasses; ++c) n.waiting[0][c] += static_cast<float>(n.came[c]);
  n.used = {};
  n.came = {};
}

void ReuseRates::learn() {
  Counts& n = *counts_;
  float of_all = 0;  // at the bin before
  for (uint32_t b = 0; b < kBins; ++b) {
    ByClass<float> reused{}, waited{};
    for (uint32_t x = b; x < kWidths.until[b]; ++x) {
      for (uint32_t c = 0; c < kClasses; ++c) {
        reused[c] += n.reused[x][c];
        waited[c] += n.waited[x][c];
      }
    }
    of_all = (std::accumulate(reused.begin(), reused.end(), kPrior * of_all)) / std::accumulate(waited.begin(), waited.end(), kPrior);
    for (uint32_t c = 0; c < kClasses; ++c) n.rate[b][c] = (reused[c] + kPrior * of_all) / (waited[c] + kPrior);
  }
  for (ByAge* counts : {&n.reused, &n.waited}) {
    for (ByClass<float>& of_age : *counts) {
      for (float& x : of_age) x = x > kLeast ? x * kKept : 0.0F;
    }
  }
}

}  // namespace mtrains
