#include "lru_curve.h"

namespace mtrains {

LruCurve::LruCurve(int64_t rows, std::vector<int64_t> sizes)
    : sizes_(std::move(sizes)), too_small_(sizes_.size() + 1), time_of_(static_cast<size_t>(rows)),
      row_at_(static_cast<size_t>(2 * rows + 64), -1), newer_(row_at_.size()), seen_(static_cast<size_t>(rows)) {}

int32_t LruCurve::used_up_to(int32_t time) const {
  int32_t sum = 0;
  for (; time > 0; time &= time - 1) sum += newer_[static_cast<size_t>(time)];
  return sum;
}

void LruCurve::add(int32_t time, int32_t change) {
  for (; static_cast<size_t>(time) < newer_.size(); time += time & -time) newer_[static_cast<size_t>(time)] += change;
}

void LruCurve::renumber() {
  const int32_t times = clock_;
  clock_ = 0;
  for (int32_t t = 1; t <= times; ++t) {
    const int32_t row = row_at_[static_cast<size_t>(t)];
    if (row < 0) continue;
    row_at_[static_cast<size_t>(t)] = -1;
    row_at_[static_cast<size_t>(++clock_)] = row;
    time_of_[static_cast<size_t>(row)] = clock_;
  }
  std::fill(newer_.begin(), newer_.end(), 0);
  for (int32_t t = 1; t <= clock_; ++t) newer_[static_cast<size_t>(t)] = 1;
  for (size_t t = 1; t < newer_.size(); ++t) {
    const size_t next = t + (t & (~t + 1));
    if (next < newer_.size()) newer_[next] += newer_[t];
  }
}

void LruCurve::use(std::span<const int64_t> batch) {
  pass_ += 2;
  for (const int64_t row : batch) {
    uint32_t& seen = seen_[static_cast<size_t>(row)];
    if (seen == pass_) continue;
    seen = pass_;
    const int32_t time = time_of_[static_cast<size_t>(row)];
    size_t smaller = sizes_.size();
    if (time > 0) {
      const int64_t distance = rows_used_ - used_up_to(time);
      smaller = static_cast<size_t>(std::upper_bound(sizes_.begin(), sizes_.end(), distance) - sizes_.begin());
    }
    ++too_small_[smaller];
  }
  last_uses_.clear();
  for (auto row = batch.rbegin(); row != batch.rend(); ++row) {
    uint32_t& seen = seen_[static_cast<size_t>(*row)];
    if (seen == pass_) last_uses_.push_back(*row);
    seen = pass_ + 1;
  }
  for (auto row = last_uses_.rbegin(); row != last_uses_.rend(); ++row) {
    if (static_cast<size_t>(clock_) + 1 == row_at_.size()) renumber();
    int32_t& time = time_of_[static_cast<size_t>(*row)];
    if (time > 0) {
      row_at_[static_cast<size_t>(time)] = -1;
      add(time, -1);
    } else {
      ++rows_used_;
    }
    time = ++clock_;
    row_at_[static_cast<size_t>(time)] = static_cast<int32_t>(*row);
    add(time, 1);
  }
}

std::vector<int64_t> LruCurve::misses() const {
  std::vector<int64_t> misses(sizes_.size());
  int64_t sum = 0;
  for (size_t k = sizes_.size(); k-- > 0;) misses[k] = sum += too_small_[k + 1];
  return misses;
}

}  // namespace mtrains
