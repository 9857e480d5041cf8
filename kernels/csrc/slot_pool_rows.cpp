// Of SlotPool: rows by their numbers, wherever they are, and what becomes of them outside of batches.
#include "slot_pool.h"

#include <algorithm>
#include <cstring>

#include "errors.h"

namespace mtrains {

void SlotPool::flush() {
  const auto lock = idle();
  drain(begun_seq_);
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
  const auto newest = static_cast<uint32_t>(begun_seq_ - base_);
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
  const auto lock = idle();
  require_rows(table, first_row, count);
  drain(begun_seq_);
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
  const auto lock = idle();
  require_rows(table, first_row, count);
  drain(begun_seq_);
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
  const auto lock = idle();
  while (revoke_youngest()) {
  }
  if (const int64_t held = outstanding(); held > 0) {
    throw Error(ErrorKind::kTicket, std::to_string(held) + " forward passes of tiered tables have not run their "
                                        "backward; run it or drop their outputs before the tables are restored");
  }
  drain(begun_seq_);
  for (SlotDirectory& d : directories_) {
    for (int32_t s = 0; s < d.pool_rows(); ++s) {
      if (d.row_of_slot(s) >= 0) d.drop(s);
    }
  }
  set_filled();
}

std::vector<int64_t> SlotPool::resident_rows(size_t table) const {
  const auto lock = idle();
  const std::vector<int32_t> slots = directories_.at(table).by_age();
  std::vector<int64_t> rows;
  rows.reserve(slots.size());
  for (const int32_t s : slots) rows.push_back(directories_[table].row_of_slot(s));
  return rows;
}

int64_t SlotPool::warm(size_t table, std::span<const int64_t> rows) {
  constexpr size_t kMostBatchRows = 16384, kBatches = 32;  // guesses: reads for the deepest queue; the grain of the order
  const auto lock = idle();
  SlotDirectory& d = directories_.at(table);
  for (const int64_t row : rows) require_rows(table, row, 1);
  const auto room = static_cast<size_t>(d.pool_rows() - d.resident());
  if (rows.size() > room) rows = rows.last(room);
  const size_t batch_rows = std::min(rows.size() / kBatches + 1, kMostBatchRows);
  std::vector<int64_t> slots(batch_rows);
  int64_t read = 0;
  while (!rows.empty()) {
    const auto batch = rows.first(std::min(rows.size(), batch_rows));
    {
      std::lock_guard guard(tickets_mutex_);
      begun_seq_ = ++last_seq_;
    }
    renumber_if_due(begun_seq_);
    const Stamp stamp = stamp_of(begun_seq_, false);
    Ticket ticket{Stage::kBeginning, false, {}, slots.data(), false, {}, {}};
    d.lookup(batch.data(), 0, static_cast<int64_t>(batch.size()), stamp, 0, slots.data());
    read += static_cast<int64_t>(d.missed_rows().size());
    d.reserve(0, stamp, nullptr);  // free slots alone: there are enough
    start_fills(begun_seq_, ticket, stamp);
    drain(begun_seq_);
    rows = rows.subspan(batch.size());
  }
  return read;
}

}  // namespace mtrains
