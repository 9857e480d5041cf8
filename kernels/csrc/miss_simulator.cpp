#include "miss_simulator.h"

#include <algorithm>
#include <string>

#include "errors.h"

namespace mtrains {

MissSimulator::MissSimulator(int64_t rows, const std::vector<int64_t>& pool_rows, uint32_t lookahead, uint32_t outstanding)
    : lookahead_(lookahead), outstanding_(outstanding), pools_(pool_rows.size()) {
  if (lookahead > 64) {
    throw Error(ErrorKind::kConfiguration, "lookahead must be at most 64 batches, one bit of a row's window each, got " + std::to_string(lookahead));
  }
  for (size_t p = 0; p < pools_.size(); ++p) {
    if (pool_rows[p] < 1 || pool_rows[p] > INT32_MAX) {
      throw Error(ErrorKind::kConfiguration, "a simulated pool must have 1 to " + std::to_string(INT32_MAX) + " rows, got " + std::to_string(pool_rows[p]));
    }
    pools_[p].directory = std::make_unique<SlotDirectory>(rows, static_cast<int32_t>(pool_rows[p]));
  }
}

void MissSimulator::know(std::span<const int64_t> batch) {
  window_.emplace_back(batch.begin(), batch.end());
  if (lookahead_ == 0) return look_up();
  const std::vector<int64_t>& ids = window_.back();
  const uint64_t number = looked_up_ + window_.size();
  for (Pool& pool : pools_) {
    if (pool.directory) pool.directory->announce(ids.data(), 0, static_cast<int64_t>(ids.size()), bit(number));
  }
  if (window_.size() == lookahead_) look_up();
}

void MissSimulator::finish() {
  while (!window_.empty()) look_up();
}

void MissSimulator::look_up() {
  const std::vector<int64_t> ids = std::move(window_.front());
  window_.pop_front();
  ++looked_up_;
  if (looked_up_ > INT32_MAX) throw Error(ErrorKind::kConfiguration, "a simulation has at most " + std::to_string(INT32_MAX) + " batches");
  slots_.resize(ids.size());
  for (Pool& pool : pools_) {
    if (pool.directory && !begin(pool, ids)) pool.directory.reset();
  }
}

bool MissSimulator::begin(Pool& pool, std::span<const int64_t> ids) {
  SlotDirectory& d = *pool.directory;
  const auto batch = static_cast<uint32_t>(looked_up_);
  const Stamp stamp = Stamp::of(batch, true);
  d.lookup(ids.data(), 0, static_cast<int64_t>(ids.size()), stamp, lookahead_ ? bit(looked_up_) : 0, slots_.data());
  if (lookahead_) d.set_first_announced(looked_up_ + 1);
  const size_t missed = d.missed_rows().size();
  if (missed == 0) return true;
  const uint32_t oldest = batch > outstanding_ ? batch - outstanding_ : 1;
  if (!d.reserve(oldest, stamp, nullptr) && !d.reserve(batch, stamp, nullptr)) return false;
  for (const int32_t slot : d.reserved_slots()) pool.write_backs += d.row_of_slot(slot) >= 0;
  pool.misses += static_cast<int64_t>(missed);
  d.commit(stamp, slots_.data());
  return true;
}

void MissSimulator::check() const {
  for (const Pool& pool : pools_) {
    if (pool.directory) pool.directory->check();
  }
}

}  // namespace mtrains
