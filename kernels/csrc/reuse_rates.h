// ReuseRates: how likely a row is to be used in the next batch, learned from the batches themselves.
//
// What is known of a row is its *pace*, a mean of the batches between its uses, of which late ones weigh more, and its *age*, the batches
// since its last use. Rows of like paces are a *class*. Of each class, by age: in how many batches its rows waited, and how often one
// was used. The second over the first is the rate; how it falls with age is what frequency, recency, bursts and drift differ in. (Ranking
// by learned rates of hits: LHD, Beckmann et al., NSDI 2018; this one counts rows in the pool and out of it alike, so that it learns of
// rows that left, too.)
//
// Paces and ages are in quarter octaves ("bins") of batches. Old batches fade: half in about 100.
//
// Invariant: as many rows wait as were used so far, but for rounding; those of one bin leave it at an even rate, as if they had come so.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace mtrains {

class ReuseRates {
 public:
  static constexpr uint32_t kBins = 57;                // the last one: 16,384 batches and more
  static constexpr uint32_t kSlowest = 55, kOnce = 56, kUnused = 60;  // paces: of rows used twice or more, used once, and never yet
  static constexpr uint32_t kClasses = 15;             // of rows that have been used

  ReuseRates();

  static uint32_t bin(uint32_t batches) {  // >= 1
    return std::min((std::bit_cast<uint32_t>(static_cast<float>(batches)) >> 21) - (127u << 2), kBins - 1);
  }
  static uint32_t class_of(uint32_t pace) { return pace >> 2; }

  // A row of that pace is used, so many batches after its last use. Returns its pace from now on.
  uint32_t used(uint32_t pace, uint32_t age) {
    const uint32_t at = bin(age | !age), next = kNextPace[pace][at];
    ++counts_->used[at][class_of(pace)];
    ++counts_->came[class_of(next)];
    return next;
  }

  uint32_t now() const { return now_; }  // the batch of the moment
  void advance_to(uint32_t batch);
  void renumber(uint32_t by) { now_ -= std::min(now_, by); }

  // Of a row of that class, in each batch at about that age.
  float rate(uint32_t of_class, uint32_t age) const { return counts_->rate[bin(age | !age)][of_class]; }

 private:
  template <class T>
  using ByClass = std::array<T, kClasses + 1>;  // the last: rows used for the first time, of which nothing is learned
  using ByAge = std::array<ByClass<float>, kBins>;
  struct Counts {
    std::array<ByClass<uint32_t>, kBins> used{};  // in the batch of the moment
    ByClass<uint32_t> came{};                     // to the class, in the batch of the moment
    ByAge waiting{}, waited{}, reused{}, rate{};
  };
  static constexpr size_t kRow = 64;  // paces and bins, and room to address them by shifts
  using Paces = std::array<std::array<uint8_t, kRow>, kRow>;
  static Paces next_paces();
  static const Paces kNextPace;

  void end_batch();
  void learn();

  std::unique_ptr<Counts> counts_;
  uint32_t now_ = 0;
  uint32_t batches_to_learn_;
};

}  // namespace mtrains
