#include "slot_pool.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "errors.h"

namespace mtrains {

SlotPool::SlotPool(std::vector<SlotPoolTable> tables, std::vector<int32_t> table_of_feature, uint32_t batch_limit)
    : tables_(std::move(tables)), table_of_feature_(std::move(table_of_feature)), batch_limit_(batch_limit),
      stats_(tables_.size()), hands_(tables_.size(), 0) {
  directories_.reserve(tables_.size());
  for (const SlotPoolTable& t : tables_) directories_.emplace_back(t.rows, t.pool_rows);
}

SlotPool::~SlotPool() {
  try {
    drain(last_seq_);
  } catch (const Error&) {  // the rows of a failed fill are not lost: they are still in their home
  }
}

std::vector<int64_t> SlotPool::bounds_of(const Batch& batch) const {
  std::vector<int64_t> bounds(table_of_feature_.size() + 1);
  for (size_t f = 0; f < bounds.size(); ++f) {
    const size_t at = f * static_cast<size_t>(batch.stride);
    bounds[f] = batch.offsets_are_int32 ? static_cast<const int32_t*>(batch.offsets)[at]
                                        : static_cast<const int64_t*>(batch.offsets)[at];
    const int64_t least = f == 0 ? 0 : bounds[f - 1];
    if (bounds[f] < least || bounds[f] > batch.id_count) {
      throw Error(ErrorKind::kConfiguration, "offsets must not decrease and end within the ids: feature " +
                                                 std::to_string(f) + " begins at " + std::to_string(bounds[f]) +
                                                 " of " + std::to_string(batch.id_count) + " ids");
    }
  }
  return bounds;
}

namespace {

// Position of the first id outside [0, rows), or -1. An id is bad if it or (rows - 1 - id) is negative: a loop of signs
// alone, which compilers turn into vector instructions.
template <class Index>
int64_t first_out_of_range(const Index* ids, int64_t count, int64_t rows) {
  const auto last = static_cast<uint64_t>(rows - 1);
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
    signs |= id | (last - id);
  }
  if (!(signs >> 63)) return -1;
  for (int64_t i = 0;; ++i) {
    if (static_cast<uint64_t>(static_cast<int64_t>(ids[i])) > last) return i;
  }
}

}  // namespace

void SlotPool::check_ids(const Batch& batch, const std::vector<int64_t>& bounds) const {
  for (size_t f = 0; f < table_of_feature_.size(); ++f) {
    const SlotPoolTable& table = tables_[table_of_feature_[f]];
    const int64_t begin = bounds[f], count = bounds[f + 1] - begin;
    const auto* narrow = static_cast<const int32_t*>(batch.ids) + begin;
    const auto* wide = static_cast<const int64_t*>(batch.ids) + begin;
    const int64_t at = batch.ids_are_int32 ? first_out_of_range(narrow, count, table.rows)
                                           : first_out_of_range(wide, count, table.rows);
    if (at < 0) continue;
    const int64_t id = batch.ids_are_int32 ? narrow[at] : wide[at];
    throw Error(ErrorKind::kIdOutOfRange,
                "id " + std::to_string(id) + " of table '" + table.name + "' (feature " + std::to_string(f) +
                    " of the group, position " + std::to_string(at) + ") is outside [0, " +
                    std::to_string(table.rows) + "). Nothing was changed. Fix the input, hash ids into range, or set "
                    "bounds_check_mode to WARNING to have them read row 0");
  }
}

uint32_t SlotPool::oldest_outstanding() const {
  return tickets_.empty() ? UINT32_MAX : static_cast<uint32_t>(tickets_.begin()->first - base_);
}

uint64_t SlotPool::next_seq() {
  if (last_seq_ + 1 - base_ >= batch_limit_) {
    const uint64_t oldest = tickets_.empty() ? last_seq_ + 1 : tickets_.begin()->first;
    const uint64_t shift = oldest - base_ - 1;
    if (shift == 0) {
      throw Error(ErrorKind::kTicket, "a batch has been outstanding for " + std::to_string(batch_limit_) +
                                          " batches; release its output");
    }
    for (SlotDirectory& d : directories_) d.age(static_cast<uint32_t>(shift));
    base_ += shift;
  }
  return ++last_seq_;
}

uint64_t SlotPool::begin(const Batch& batch, int64_t* slots, bool hard, bool dirty) {
  std::lock_guard lock(mutex_);
  Ticket ticket{hard, slots, bounds_of(batch)};
  check_ids(batch, ticket.bounds);
  const uint64_t seq = next_seq();
  const Stamp stamp = stamp_of(seq, dirty);
  std::vector<int64_t> unique(tables_.size(), 0);
  for (size_t f = 0; f < table_of_feature_.size(); ++f) {
    const int32_t t = table_of_feature_[f];
    const int64_t begin = ticket.bounds[f], end = ticket.bounds[f + 1];
    unique[t] += batch.ids_are_int32 ? directories_[t].lookup(static_cast<const int32_t*>(batch.ids), begin, end, stamp, slots)
                                     : directories_[t].lookup(static_cast<const int64_t*>(batch.ids), begin, end, stamp, slots);
  }
  try {
    if (!reserve_all(ticket, stamp, hard)) {
      rollback();
      ++declined_;
      return 0;
    }
    evict_victims();
  } catch (...) {
    rollback();
    throw;
  }
  for (size_t f = 0; f < table_of_feature_.size(); ++f) stats_[table_of_feature_[f]].lookups += ticket.bounds[f + 1] - ticket.bounds[f];
  for (size_t t = 0; t < tables_.size(); ++t) {
    stats_[t].unique_rows += unique[t] + static_cast<int64_t>(directories_[t].missed_rows().size());
    stats_[t].misses += static_cast<int64_t>(directories_[t].missed_rows().size());
  }
  tickets_.emplace(seq, std::move(ticket));
  start_fills(seq, stamp, slots, dirty);
  return seq;
}

void SlotPool::rollback() {
  for (SlotDirectory& d : directories_) d.rollback();
}

bool SlotPool::reserve_all(const Ticket& mine, Stamp stamp, bool hard) {
  for (size_t t = 0; t < tables_.size(); ++t) {
    if (directories_[t].missed_rows().empty()) continue;
    if (directories_[t].reserve(oldest_outstanding(), stamp, nullptr)) continue;
    while (!reserve_exactly(t, mine, stamp)) {
      if (!hard) return false;
      if (!revoke_youngest()) refuse(t, mine);
    }
  }
  return true;
}

void SlotPool::mark_slots(size_t table, const Ticket& ticket, std::vector<uint8_t>& flags) const {
  for (size_t f = 0; f < table_of_feature_.size(); ++f) {
    if (static_cast<size_t>(table_of_feature_[f]) != table) continue;
    for (int64_t i = ticket.bounds[f]; i < ticket.bounds[f + 1]; ++i) {
      if (ticket.slots[i] >= 0) flags[ticket.slots[i]] = 1;
    }
  }
}

size_t SlotPool::pinned_by_others(size_t table, const Ticket&, std::vector<uint8_t>& pinned) const {
  pinned.assign(tables_[table].pool_rows, 0);
  for (const auto& [seq, ticket] : tickets_) mark_slots(table, ticket, pinned);
  return static_cast<size_t>(std::count(pinned.begin(), pinned.end(), 1));
}

bool SlotPool::reserve_exactly(size_t table, const Ticket& mine, Stamp stamp) {
  std::vector<uint8_t> pinned;
  pinned_by_others(table, mine, pinned);
  mark_slots(table, mine, pinned);
  return directories_[table].reserve(0, stamp, &pinned);
}

void SlotPool::refuse(size_t table, const Ticket& mine) const {
  std::vector<uint8_t> pinned, own(tables_[table].pool_rows, 0);
  const size_t others = pinned_by_others(table, mine, pinned);
  mark_slots(table, mine, own);
  const size_t hits = static_cast<size_t>(std::count(own.begin(), own.end(), 1));
  const size_t needed = hits + directories_[table].missed_rows().size();
  throw Error(ErrorKind::kPoolTooSmall,
              "table '" + tables_[table].name + "': this batch has " + std::to_string(needed) +
                  " distinct rows, its slot pool has " + std::to_string(tables_[table].pool_rows) + " (pool_rows), and " +
                  std::to_string(others) + " slots are pinned by " + std::to_string(tickets_.size()) +
                  " forward passes whose backward has not run. Nothing was changed. Raise pool_rows to at least " +
                  std::to_string(needed + others) + ", use smaller batches, or drop outputs that need no backward");
}

bool SlotPool::revoke_youngest() {
  for (auto it = tickets_.rbegin(); it != tickets_.rend(); ++it) {
    if (it->second.hard) continue;
    drain(it->first);
    tickets_.erase(std::next(it).base());
    ++revoked_;
    return true;
  }
  return false;
}

void SlotPool::evict_victims() {
  std::vector<int64_t> rows[2];
  std::vector<int32_t> slots[2];
  for (size_t t = 0; t < tables_.size(); ++t) {
    for (const bool dirty : {false, true}) {
      rows[dirty].clear();
      slots[dirty].clear();
    }
    for (const int32_t slot : directories_[t].reserved_slots()) {
      const int64_t row = directories_[t].row_of_slot(slot);
      if (row < 0) continue;
      rows[directories_[t].dirty(slot)].push_back(row);
      slots[directories_[t].dirty(slot)].push_back(slot);
    }
    for (const bool dirty : {false, true}) {
      if (!rows[dirty].empty()) tables_[t].volume->evict(tables_[t].id, rows[dirty], slots[dirty], tables_[t].parts, dirty);
    }
    stats_[t].write_backs += static_cast<int64_t>(rows[true].size());
  }
}

void SlotPool::start_fills(uint64_t seq, Stamp stamp, int64_t* slots, bool dirty) {
  std::vector<std::vector<GetRequest>> requests;
  Fill fill{seq, {}};
  for (size_t t = 0; t < tables_.size(); ++t) {
    const auto missed = directories_[t].missed_rows();
    if (missed.empty()) continue;
    const auto reserved = directories_[t].reserved_slots();
    size_t v = 0;
    while (v < fill.reads.size() && fill.reads[v].volume != tables_[t].volume) ++v;
    if (v == fill.reads.size()) {
      fill.reads.push_back({tables_[t].volume, 0, {}});
      requests.emplace_back();
    }
    requests[v].push_back({tables_[t].id, {missed.begin(), missed.end()}, {reserved.begin(), reserved.end()}, tables_[t].parts, dirty});
    fill.reads[v].slots.emplace_back(t, std::vector<int32_t>(reserved.begin(), reserved.end()));
    directories_[t].commit(stamp, slots);
  }
  if (fill.reads.empty()) return;
  size_t submitted = 0;
  try {
    for (; submitted < fill.reads.size(); ++submitted) {
      fill.reads[submitted].token = fill.reads[submitted].volume->submit_get(std::move(requests[submitted]));
    }
  } catch (...) {
    const std::exception_ptr cause = std::current_exception();
    for (size_t v = submitted; v < fill.reads.size(); ++v) abandon(fill.reads[v]);
    fill.reads.resize(submitted);
    fills_.push_back(std::move(fill));
    while (!fills_.empty()) {
      try {
        finish_oldest_fill();
      } catch (...) {  // its rows have left the pool; this batch fails with its own error
      }
    }
    tickets_.erase(seq);
    std::rethrow_exception(cause);
  }
  fills_.push_back(std::move(fill));
}

std::exception_ptr SlotPool::finish(const Fill& fill) {
  std::exception_ptr first;
  for (const Fill::Read& read : fill.reads) {
    try {
      read.volume->wait(read.token);
    } catch (...) {
      if (!first) first = std::current_exception();
      abandon(read);
    }
  }
  if (first) std::erase_if(tickets_, [&](const auto& t) { return !t.second.hard && t.first >= fill.seq; });
  return first;
}

void SlotPool::abandon(const Fill::Read& read) {
  for (const auto& [table, slots] : read.slots) {
    for (const int32_t slot : slots) directories_[table].drop(slot);
  }
}

void SlotPool::finish_oldest_fill() {
  const Fill fill = std::move(fills_.front());
  fills_.pop_front();
  if (const std::exception_ptr cause = finish(fill)) std::rethrow_exception(cause);
}

void SlotPool::drain(uint64_t up_to_seq) {
  while (!fills_.empty() && fills_.front().seq <= up_to_seq) finish_oldest_fill();
}

bool SlotPool::acquire(uint64_t seq, bool dirty) {
  std::lock_guard lock(mutex_);
  const auto it = tickets_.find(seq);
  if (it == tickets_.end()) return false;
  it->second.hard = true;
  if (dirty) {
    for (size_t f = 0; f < table_of_feature_.size(); ++f) {
      SlotDirectory& d = directories_[table_of_feature_[f]];
      for (int64_t i = it->second.bounds[f]; i < it->second.bounds[f + 1]; ++i) d.mark_dirty(static_cast<int32_t>(it->second.slots[i]));
    }
  }
  return true;
}

void SlotPool::wait(uint64_t seq) {
  std::lock_guard lock(mutex_);
  try {
    drain(seq);
  } catch (...) {
    tickets_.erase(seq);
    throw;
  }
}

void SlotPool::release(uint64_t seq) noexcept {
  std::lock_guard lock(mutex_);
  if (!tickets_.contains(seq)) return;
  try {
    drain(seq);
  } catch (...) {  // its rows have left the pool; whoever needs them reads them again and gets the error
  }
  tickets_.erase(seq);
}

bool SlotPool::alive(uint64_t seq) const {
  std::lock_guard lock(mutex_);
  return tickets_.contains(seq);
}

void SlotPool::flush() {
  std::lock_guard lock(mutex_);
  drain(last_seq_);
  const uint32_t oldest = oldest_outstanding();
  std::vector<int64_t> rows;
  std::vector<int32_t> slots;
  for (size_t t = 0; t < tables_.size(); ++t) {
    rows.clear();
    slots.clear();
    SlotDirectory& d = directories_[t];
    for (int32_t s = 0; s < d.pool_rows(); ++s) {
      if (d.dirty(s)) slots.push_back(s);
    }
    if (slots.empty()) continue;
    d.sort_by_use(slots);
    for (const int32_t s : slots) rows.push_back(d.row_of_slot(s));
    tables_[t].volume->put(tables_[t].id, rows, slots, tables_[t].parts);
    stats_[t].flushed_rows += static_cast<int64_t>(rows.size());
    for (const int32_t s : slots) {
      if (d.batch_of_slot(s) < oldest) d.mark_clean(s);
    }
  }
}

int64_t SlotPool::trickle(size_t table, uint32_t min_age, uint32_t looks) {
  std::lock_guard lock(mutex_);
  SlotDirectory& d = directories_.at(table);
  const auto newest = static_cast<uint32_t>(last_seq_ - base_);
  if (newest < min_age) return 0;
  const uint32_t youngest = std::min(newest - min_age, oldest_outstanding() - 1);
  looks = std::min(looks, static_cast<uint32_t>(d.pool_rows()));
  std::vector<int64_t> rows;
  std::vector<int32_t> slots;
  int32_t hand = hands_[table];
  for (uint32_t i = 0; i < looks; ++i) {
    if (d.dirty(hand) && d.batch_of_slot(hand) <= youngest) slots.push_back(hand);
    hand = hand + 1 == d.pool_rows() ? 0 : hand + 1;
  }
  d.sort_by_use(slots);
  for (const int32_t s : slots) rows.push_back(d.row_of_slot(s));
  if (!rows.empty()) tables_[table].volume->put(tables_[table].id, rows, slots, tables_[table].parts);
  for (const int32_t s : slots) d.mark_clean(s);
  hands_[table] = hand;
  stats_[table].trickled_rows += static_cast<int64_t>(rows.size());
  return static_cast<int64_t>(rows.size());
}

void SlotPool::require_rows(size_t table, int64_t first_row, int64_t count) const {
  if (table >= tables_.size() || first_row < 0 || count < 0 || first_row + count > tables_[table].rows || count > INT32_MAX) {
    throw Error(ErrorKind::kIdOutOfRange, "rows [" + std::to_string(first_row) + ", " + std::to_string(first_row + count) +
                                              ") are not all in table " + std::to_string(table));
  }
}

namespace {

void copy_record(const std::vector<Part>& from, int64_t i, const std::vector<Part>& to, int64_t k) {
  for (size_t p = 0; p < from.size(); ++p) {
    if (!from[p].base || !to[p].base) continue;
    std::memcpy(to[p].base + static_cast<uint64_t>(k) * to[p].stride_bytes,
                from[p].base + static_cast<uint64_t>(i) * from[p].stride_bytes, to[p].bytes);
  }
}

}  // namespace

void SlotPool::read(size_t table, int64_t first_row, int64_t count, const std::vector<Part>& to) {
  std::lock_guard lock(mutex_);
  require_rows(table, first_row, count);
  drain(last_seq_);
  SlotPoolTable& t = tables_[table];
  std::vector<GetRequest> requests(1);
  requests[0] = {t.id, {}, {}, to};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t slot = directories_[table].slot_of_row(first_row + i);
    if (slot >= 0) {
      copy_record(t.parts, slot, to, i);
    } else {
      requests[0].rows.push_back(first_row + i);
      requests[0].slots.push_back(static_cast<int32_t>(i));
    }
  }
  if (!requests[0].rows.empty()) t.volume->wait(t.volume->submit_get(std::move(requests)));
}

void SlotPool::write(size_t table, int64_t first_row, int64_t count, const std::vector<Part>& from) {
  bool whole = true;
  for (const Part& p : from) whole &= p.base != nullptr;
  std::vector<Part> record = from;
  std::vector<std::vector<std::byte>> kept(from.size());
  if (!whole) {  // the parts that stay are read first, so that whole records are put
    for (size_t p = 0; p < from.size(); ++p) {
      kept[p].resize(static_cast<size_t>(count) * from[p].bytes);
      record[p] = {kept[p].data(), from[p].bytes, from[p].bytes};
    }
    read(table, first_row, count, record);
    for (size_t p = 0; p < from.size(); ++p) {
      if (from[p].base) record[p] = from[p];
    }
  }
  std::lock_guard lock(mutex_);
  require_rows(table, first_row, count);
  drain(last_seq_);
  SlotPoolTable& t = tables_[table];
  std::vector<int64_t> rows;
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t slot = directories_[table].slot_of_row(first_row + i);
    if (slot >= 0) {
      copy_record(from, i, t.parts, slot);
      directories_[table].mark_dirty(slot);
    } else {
      rows.push_back(first_row + i);
      slots.push_back(static_cast<int32_t>(i));
    }
  }
  if (!rows.empty()) t.volume->put(t.id, rows, slots, record);
}

void SlotPool::forget() {
  std::lock_guard lock(mutex_);
  while (revoke_youngest()) {
  }
  if (!tickets_.empty()) {
    throw Error(ErrorKind::kTicket, std::to_string(tickets_.size()) + " forward passes of tiered tables have not run their "
                                        "backward; run it or drop their outputs before the tables are restored");
  }
  drain(last_seq_);
  for (SlotDirectory& d : directories_) {
    for (int32_t s = 0; s < d.pool_rows(); ++s) {
      if (d.row_of_slot(s) >= 0) d.drop(s);
    }
  }
}

std::vector<int64_t> SlotPool::resident_rows(size_t table) const {
  std::lock_guard lock(mutex_);
  const std::vector<int32_t> slots = directories_.at(table).by_age();
  std::vector<int64_t> rows;
  rows.reserve(slots.size());
  for (const int32_t s : slots) rows.push_back(directories_[table].row_of_slot(s));
  return rows;
}

int64_t SlotPool::warm(size_t table, std::span<const int64_t> rows) {
  constexpr size_t kMostBatchRows = 16384, kBatches = 32;  // guesses: reads for the deepest queue; the grain of the order
  std::lock_guard lock(mutex_);
  SlotDirectory& d = directories_.at(table);
  for (const int64_t row : rows) require_rows(table, row, 1);
  const auto room = static_cast<size_t>(d.pool_rows() - d.resident());
  if (rows.size() > room) rows = rows.last(room);
  const size_t batch_rows = std::min(rows.size() / kBatches + 1, kMostBatchRows);
  std::vector<int64_t> slots(batch_rows);
  int64_t read = 0;
  while (!rows.empty()) {
    const auto batch = rows.first(std::min(rows.size(), batch_rows));
    const uint64_t seq = next_seq();
    const Stamp stamp = stamp_of(seq, false);
    d.lookup(batch.data(), 0, static_cast<int64_t>(batch.size()), stamp, slots.data());
    read += static_cast<int64_t>(d.missed_rows().size());
    d.reserve(0, stamp, nullptr);  // free slots alone: there are enough
    start_fills(seq, stamp, slots.data(), false);
    drain(seq);
    rows = rows.subspan(batch.size());
  }
  return read;
}

SlotPoolStats SlotPool::stats(size_t table) const {
  std::lock_guard lock(mutex_);
  SlotPoolStats s = stats_[table];
  s.evictions = directories_[table].evictions();
  return s;
}

void SlotPool::check() const {
  std::lock_guard lock(mutex_);
  for (const SlotDirectory& d : directories_) d.check();
  for (const auto& [seq, ticket] : tickets_) {
    for (size_t f = 0; f < table_of_feature_.size(); ++f) {
      const SlotDirectory& d = directories_[table_of_feature_[f]];
      for (int64_t i = ticket.bounds[f]; i < ticket.bounds[f + 1]; ++i) {
        if (d.row_of_slot(static_cast<int32_t>(ticket.slots[i])) < 0) throw std::logic_error("slot pool: a pinned slot is free");
      }
    }
  }
}

}  // namespace mtrains
