// Of SlotPool: victims leave, missed rows come, and what comes along is admitted.
#include "slot_pool.h"

#include <algorithm>

#include "errors.h"
#include "trace.h"

namespace mtrains {

void SlotPool::evict_victims(size_t table) {
  std::vector<int64_t> rows[2];
  std::vector<int32_t> slots[2];
  const SlotPoolTable& t = tables_[table];
  const SlotDirectory& d = directories_[table];
  for (const int32_t slot : d.reserved_slots()) {
    if (d.row_of_slot(slot) < 0) continue;
    rows[d.dirty(slot)].push_back(d.row_of_slot(slot));
    slots[d.dirty(slot)].push_back(slot);
  }
  if (rows[false].empty() && rows[true].empty()) return;
  const TraceSpan span("evict", rows[0].size() + rows[1].size());
  for (const bool dirty : {false, true}) {
    if (!rows[dirty].empty()) t.volume->evict(t.id, rows[dirty], slots[dirty], t.parts, dirty);
  }
  stats_[table].write_backs += static_cast<int64_t>(rows[true].size());
}

void SlotPool::start_fills(uint64_t seq, const Ticket& ticket, Stamp stamp) {
  std::vector<std::vector<GetRequest>> requests;
  Fill fill{seq, {}, nullptr};
  for (size_t t = 0; t < tables_.size(); ++t) {
    SlotDirectory& d = directories_[t];
    const auto missed = d.missed_rows();
    if (missed.empty()) continue;
    const auto reserved = d.reserved_slots();
    size_t v = 0;
    while (v < fill.reads.size() && fill.reads[v].volume != tables_[t].volume) ++v;
    if (v == fill.reads.size()) {
      fill.reads.push_back({tables_[t].volume, 0, {}});
      requests.emplace_back();
    }
    requests[v].push_back({tables_[t].id, {missed.begin(), missed.end()}, {reserved.begin(), reserved.end()}, tables_[t].parts, ticket.dirty});
    fill.reads[v].slots.emplace_back(t, std::vector<int32_t>(reserved.begin(), reserved.end()));
    d.commit(stamp, ticket.slots);
    if (d.awaits_absent_rows()) requests[v].back().wanted = &d.wanted();
  }
  if (fill.reads.empty()) return;
  fill.unready = std::make_shared<std::atomic<size_t>>(fill.reads.size());
  const auto ready = [this, unready = fill.unready, tasks = tasks_] {
    if (unready->fetch_sub(1) == 1) tasks->post([this] { finish_ready_fills(); });
  };
  size_t submitted = 0;
  try {
    for (; submitted < fill.reads.size(); ++submitted) {
      Fill::Read& read = fill.reads[submitted];
      read.token = read.volume->submit_get(std::move(requests[submitted]), ready);
      if (read.token == 0) ready();
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
    std::rethrow_exception(cause);
  }
  fills_.push_back(std::move(fill));
}

uint64_t SlotPool::rows_of(const Fill& fill) {
  uint64_t rows = 0;
  for (const Fill::Read& read : fill.reads)
    for (const auto& [table, slots] : read.slots) rows += slots.size();
  return rows;
}

std::exception_ptr SlotPool::finish(const Fill& fill) {
  const TraceSpan span("fill slots", rows_of(fill));
  std::exception_ptr first;
  for (const Fill::Read& read : fill.reads) {
    try {
      const Neighbours neighbours = read.volume->wait(read.token);
      if (!neighbours.rows.empty() && !reserving_) admit(read, neighbours);
    } catch (...) {
      if (!first) first = std::current_exception();
      abandon(read);
    }
  }
  if (!first) return first;
  std::lock_guard lock(tickets_mutex_);
  for (auto at = tickets_.lower_bound(fill.seq); at != tickets_.end();) {
    Ticket& ticket = at->second;
    if (ticket.hard && !ticket.error) ticket.error = first;
    if (ticket.hard || ticket.stage != Stage::kBegun) {
      ++at;
    } else {
      give_way((at++)->first);
    }
  }
  return first;
}

void SlotPool::admit(const Fill::Read& read, const Neighbours& neighbours) {
  struct Came {
    int64_t row;
    const std::byte* payload;
    bool operator<(const Came& other) const { return row < other.row; }
  };
  const uint32_t newest = static_cast<uint32_t>(begun_seq_ - base_), oldest = std::min(oldest_outstanding(), newest + 1);
  std::vector<std::vector<Came>> came(read.slots.size());
  for (const Neighbour& n : neighbours.rows) came[n.request].push_back({n.row, neighbours.payloads.data() + n.at});
  for (size_t r = 0; r < came.size(); ++r) {
    if (came[r].empty()) continue;
    std::sort(came[r].begin(), came[r].end());
    std::vector<int64_t> rows;
    for (const Came& c : came[r]) {
      if (rows.empty() || rows.back() != c.row) rows.push_back(c.row);
    }
    const size_t t = read.slots[r].first;
    SlotDirectory& d = directories_[t];
    d.reserve_for_wanted(rows, oldest);
    try {
      evict_victims(t);
    } catch (const Error&) {  // nobody asked for these rows: whoever needs room next meets the error
      d.rollback();
      return;
    }
    const auto missed = d.missed_rows();
    for (size_t k = 0; k < missed.size(); ++k) {
      const Came& c = *std::lower_bound(came[r].begin(), came[r].end(), Came{missed[k], nullptr});
      scatter_record(c.payload, tables_[t].parts, d.reserved_slots()[k]);
    }
    stats_[t].admitted_rows += static_cast<int64_t>(missed.size());
    d.commit(Stamp::of(std::min(oldest - 1, newest), false), nullptr);
  }
}

void SlotPool::abandon(const Fill::Read& read) {
  for (const auto& [table, slots] : read.slots) {
    for (const int32_t slot : slots) directories_[table].drop(slot);
  }
}

void SlotPool::finish_oldest_fill() {
  const Fill fill = std::move(fills_.front());
  fills_.pop_front();
  const std::exception_ptr cause = finish(fill);
  set_filled();
  if (cause) std::rethrow_exception(cause);
}

void SlotPool::finish_ready_fills() {
  std::lock_guard lock(mutex_);
  while (!fills_.empty() && *fills_.front().unready == 0) {
    try {
      finish_oldest_fill();
    } catch (const Error&) {  // the tickets that need it have it
    }
  }
}

void SlotPool::set_filled() {
  filled_seq_ = fills_.empty() ? begun_seq_ : fills_.front().seq - 1;
  full_ = std::all_of(directories_.begin(), directories_.end(), [](const SlotDirectory& d) { return d.resident() == d.rows(); });
}

void SlotPool::drain(uint64_t up_to_seq) {
  while (!fills_.empty() && fills_.front().seq <= up_to_seq) finish_oldest_fill();
}

}  // namespace mtrains
