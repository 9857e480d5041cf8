#include "slot_pool.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "errors.h"
#include "trace.h"

namespace mtrains {

SlotPool::SlotPool(std::vector<SlotPoolTable> tables, std::vector<int32_t> table_of_feature, uint32_t batch_limit)
    : tables_(std::move(tables)), table_of_feature_(std::move(table_of_feature)), batch_limit_(batch_limit),
      stats_(tables_.size()), hands_(tables_.size(), 0) {
  directories_.reserve(tables_.size());
  for (const SlotPoolTable& t : tables_) directories_.emplace_back(t.rows, t.pool_rows);
}

SlotPool::~SlotPool() {
  tasks_->close();
  std::lock_guard lock(mutex_);
  while (!fills_.empty()) {
    try {
      finish_oldest_fill();
    } catch (const Error&) {  // the rows of a failed fill are not lost: they are still in their home
    }
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

std::vector<int64_t> SlotPool::checked(const Batch& batch) const {
  std::vector<int64_t> bounds = bounds_of(batch);
  check_ids(batch, bounds);
  return bounds;
}

template <class Do>
void SlotPool::by_feature(const Batch& batch, const std::vector<int64_t>& bounds, Do&& with_ids) const {
  for (size_t f = 0; f < table_of_feature_.size(); ++f) {
    const auto t = static_cast<size_t>(table_of_feature_[f]);
    if (batch.ids_are_int32) {
      with_ids(t, static_cast<const int32_t*>(batch.ids), bounds[f], bounds[f + 1]);
    } else {
      with_ids(t, static_cast<const int64_t*>(batch.ids), bounds[f], bounds[f + 1]);
    }
  }
}

std::unique_lock<std::mutex> SlotPool::idle() const {
  while (true) {
    tasks_->drain();
    std::unique_lock lock(mutex_);
    std::lock_guard guard(tickets_mutex_);
    const auto queued = [](const auto& ticket) { return ticket.second.stage == Stage::kQueued; };
    if (std::none_of(tickets_.begin(), tickets_.end(), queued)) return lock;
  }
}

uint32_t SlotPool::oldest_outstanding() const {
  std::lock_guard lock(tickets_mutex_);
  for (const auto& [seq, ticket] : tickets_) {
    if (ticket.stage == Stage::kBegun) return static_cast<uint32_t>(seq - base_);
  }
  return UINT32_MAX;
}

void SlotPool::renumber_if_due(uint64_t seq) {
  if (seq - base_ < batch_limit_) return;
  const uint32_t oldest = oldest_outstanding();
  const uint64_t shift = (oldest == UINT32_MAX ? seq - base_ : oldest) - 1;
  if (shift == 0) {
    throw Error(ErrorKind::kTicket, "a batch has been outstanding for " + std::to_string(batch_limit_) + " batches; release its output");
  }
  for (SlotDirectory& d : directories_) d.age(static_cast<uint32_t>(shift));
  base_ += shift;
}

// -- the future

uint64_t SlotPool::announce(const Batch& batch) {
  std::vector<int64_t> bounds = checked(batch);
  std::lock_guard lock(tickets_mutex_);
  if (!announced_.empty() && last_announced_ + 1 - announced_.begin()->first >= 64) return 0;
  const uint64_t number = ++last_announced_;
  announced_.emplace(number, Announced{batch, std::move(bounds)});
  tasks_->post([this, number] {
    std::lock_guard rows(mutex_);
    const Announced* mine;
    {
      std::lock_guard guard(tickets_mutex_);
      const auto at = announced_.find(number);
      if (at == announced_.end()) return;  // withdrawn
      mine = &at->second;
    }
    by_feature(mine->batch, mine->bounds, [&](size_t t, const auto* ids, int64_t begin, int64_t end) {
      if (directories_[t].resident() < directories_[t].rows()) directories_[t].announce(ids, begin, end, bit_of(number));
    });
    set_first_announced();
  });
  return number;
}

uint64_t SlotPool::bit_of(uint64_t announced) const { return announced ? uint64_t{1} << (announced % 64) : 0; }

void SlotPool::set_first_announced() {
  uint64_t first;
  {
    std::lock_guard lock(tickets_mutex_);
    first = announced_.empty() ? last_announced_ + 1 : announced_.begin()->first;
  }
  for (SlotDirectory& d : directories_) d.set_first_announced(first);
}

void SlotPool::end_announced(uint64_t announced) {
  {
    std::lock_guard lock(tickets_mutex_);
    announced_.erase(announced);
  }
  set_first_announced();
}

void SlotPool::withdraw(uint64_t announced) {
  const auto lock = idle();
  withdraw_locked(announced);
}

void SlotPool::withdraw_locked(uint64_t announced) {
  Announced mine;
  {
    std::lock_guard lock(tickets_mutex_);
    const auto at = announced_.find(announced);
    if (at == announced_.end()) return;
    mine = at->second;
  }
  by_feature(mine.batch, mine.bounds,
             [&](size_t t, const auto* ids, int64_t begin, int64_t end) { directories_[t].withdraw(ids, begin, end, bit_of(announced)); });
  end_announced(announced);
}

// -- batches

uint64_t SlotPool::add_ticket(Ticket ticket) {
  const uint64_t seq = ++last_seq_;
  tickets_.emplace(seq, std::move(ticket));
  return seq;
}

uint64_t SlotPool::prefetch(const Batch& batch, int64_t* slots, bool dirty, uint64_t announced) {
  Ticket ticket{Stage::kQueued, false, batch, slots, checked(batch), dirty, announced, {}};
  std::lock_guard lock(tickets_mutex_);
  const uint64_t seq = add_ticket(std::move(ticket));
  tasks_->post([this, seq] { begin_queued(seq); });
  return seq;
}

void SlotPool::begin_queued(uint64_t seq) {
  std::lock_guard lock(mutex_);
  Ticket* mine;
  {
    std::lock_guard guard(tickets_mutex_);
    const auto at = tickets_.find(seq);
    if (at == tickets_.end()) return;  // released
    mine = &at->second;
    mine->stage = Stage::kBeginning;
  }
  const uint64_t announced = mine->announced;
  bool begun = false;
  try {
    begun = look_up(seq, *mine);
    if (!begun) ++declined_;
  } catch (const Error&) {  // the forward does the work, and meets the error where it can be told
    withdraw_locked(announced);
  }
  {
    std::lock_guard guard(tickets_mutex_);
    if (!begun) tickets_.erase(seq);
  }
  stage_changed_.notify_all();
}

uint64_t SlotPool::begin(const Batch& batch, int64_t* slots, bool dirty, uint64_t announced) {
  Ticket ticket{Stage::kBeginning, true, batch, slots, checked(batch), dirty, announced, {}};
  const auto lock = idle();
  uint64_t seq;
  Ticket* mine;
  {
    std::lock_guard guard(tickets_mutex_);
    seq = add_ticket(std::move(ticket));
    mine = &tickets_.at(seq);
  }
  try {
    look_up(seq, *mine);
  } catch (...) {
    withdraw_locked(announced);
    std::lock_guard guard(tickets_mutex_);
    tickets_.erase(seq);
    throw;
  }
  return seq;
}

bool SlotPool::look_up(uint64_t seq, Ticket& ticket) {
  const TraceSpan span("look up", static_cast<uint64_t>(ticket.batch.id_count));
  renumber_if_due(seq);
  const Stamp stamp = stamp_of(seq, ticket.dirty);
  const uint64_t bit = bit_of(ticket.announced);
  std::vector<int64_t> unique(tables_.size(), 0);
  by_feature(ticket.batch, ticket.bounds, [&](size_t t, const auto* ids, int64_t begin, int64_t end) {
    unique[t] += directories_[t].lookup(ids, begin, end, stamp, bit, ticket.slots);
  });
  if (ticket.announced) end_announced(ticket.announced);
  try {
    if (!reserve_all(ticket, stamp)) {
      rollback();
      return false;
    }
    for (size_t t = 0; t < tables_.size(); ++t) evict_victims(t);
  } catch (...) {
    rollback();
    throw;
  }
  for (size_t f = 0; f < table_of_feature_.size(); ++f) stats_[table_of_feature_[f]].lookups += ticket.bounds[f + 1] - ticket.bounds[f];
  for (size_t t = 0; t < tables_.size(); ++t) {
    ++stats_[t].batches;
    stats_[t].unique_rows += unique[t] + static_cast<int64_t>(directories_[t].missed_rows().size());
    stats_[t].misses += static_cast<int64_t>(directories_[t].missed_rows().size());
  }
  {
    std::lock_guard guard(tickets_mutex_);
    ticket.stage = Stage::kBegun;
  }
  begun_seq_ = seq;
  start_fills(seq, ticket, stamp);
  set_filled();
  return true;
}

void SlotPool::rollback() {
  for (SlotDirectory& d : directories_) d.rollback();
}

bool SlotPool::reserve_all(const Ticket& mine, Stamp stamp) {
  struct Reserving {
    bool& now;
    explicit Reserving(bool& flag) : now(flag) { now = true; }
    ~Reserving() { now = false; }
  } const reserving(reserving_);
  return reserve_each(mine, stamp);
}

bool SlotPool::reserve_each(const Ticket& mine, Stamp stamp) {
  for (size_t t = 0; t < tables_.size(); ++t) {
    if (directories_[t].missed_rows().empty()) continue;
    if (directories_[t].reserve(oldest_outstanding(), stamp, nullptr)) continue;
    while (!reserve_exactly(t, mine, stamp)) {
      if (!mine.hard) return false;
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
  std::lock_guard lock(tickets_mutex_);  // a ticket's slots array is there while the ticket is
  for (const auto& [seq, ticket] : tickets_) {
    if (ticket.stage == Stage::kBegun) mark_slots(table, ticket, pinned);
  }
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
                  std::to_string(others) + " slots are pinned by " + std::to_string(outstanding() - 1) +
                  " forward passes whose backward has not run. Nothing was changed. Raise pool_rows to at least " +
                  std::to_string(needed + others) + ", use smaller batches, or drop outputs that need no backward");
}

bool SlotPool::revoke_youngest() {
  uint64_t youngest = 0;
  {
    std::lock_guard lock(tickets_mutex_);
    for (const auto& [seq, ticket] : tickets_) {
      if (!ticket.hard && ticket.stage == Stage::kBegun) youngest = seq;
    }
  }
  if (youngest == 0) return false;
  drain(youngest);
  std::lock_guard lock(tickets_mutex_);
  const auto at = tickets_.find(youngest);
  if (at == tickets_.end() || at->second.hard) return true;  // released or acquired meanwhile
  tickets_.erase(at);
  ++revoked_;
  return true;
}

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
    {
      std::lock_guard lock(tickets_mutex_);
      tickets_.erase(seq);
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
    at = ticket.hard || ticket.stage != Stage::kBegun ? std::next(at) : tickets_.erase(at);
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

void SlotPool::set_filled() { filled_seq_ = fills_.empty() ? begun_seq_ : fills_.front().seq - 1; }

void SlotPool::drain(uint64_t up_to_seq) {
  while (!fills_.empty() && fills_.front().seq <= up_to_seq) finish_oldest_fill();
}

bool SlotPool::acquire(uint64_t seq, bool dirty) {
  const Ticket* mine;
  {
    std::unique_lock lock(tickets_mutex_);
    auto at = tickets_.find(seq);
    stage_changed_.wait(lock, [&] {
      at = tickets_.find(seq);
      return at == tickets_.end() || at->second.stage == Stage::kBegun;
    });
    if (at == tickets_.end()) return false;
    at->second.hard = true;
    mine = &at->second;
  }
  if (dirty) {
    std::lock_guard lock(mutex_);
    for (size_t f = 0; f < table_of_feature_.size(); ++f) {
      SlotDirectory& d = directories_[table_of_feature_[f]];
      for (int64_t i = mine->bounds[f]; i < mine->bounds[f + 1]; ++i) d.mark_dirty(static_cast<int32_t>(mine->slots[i]));
    }
  }
  return true;
}

void SlotPool::wait(uint64_t seq) {
  std::exception_ptr cause;
  if (filled_seq_ < seq) {
    std::lock_guard lock(mutex_);
    try {
      drain(seq);
    } catch (...) {
      cause = std::current_exception();
    }
  }
  std::lock_guard lock(tickets_mutex_);
  const auto at = tickets_.find(seq);
  if (at == tickets_.end()) return;
  if (!cause) cause = at->second.error;
  if (!cause) return;
  tickets_.erase(at);
  std::rethrow_exception(cause);
}

void SlotPool::release(uint64_t seq) noexcept {
  std::unique_lock lock(tickets_mutex_);
  auto at = tickets_.find(seq);
  if (at != tickets_.end() && at->second.stage == Stage::kQueued) {
    const uint64_t announced = at->second.announced;
    tickets_.erase(at);
    lock.unlock();
    if (!announced) return;
    std::lock_guard rows(mutex_);
    withdraw_locked(announced);
    return;
  }
  stage_changed_.wait(lock, [&] {
    at = tickets_.find(seq);
    return at == tickets_.end() || at->second.stage == Stage::kBegun;
  });
  if (at == tickets_.end()) return;
  lock.unlock();
  if (filled_seq_ < seq) {
    std::lock_guard rows(mutex_);
    try {
      drain(seq);
    } catch (...) {  // its rows have left the pool; whoever needs them reads them again and gets the error
    }
  }
  lock.lock();
  tickets_.erase(seq);
}

bool SlotPool::alive(uint64_t seq) const {
  std::lock_guard lock(tickets_mutex_);
  return tickets_.contains(seq);
}

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
    Ticket ticket{Stage::kBeginning, false, {}, slots.data(), {}, false, 0, {}};
    d.lookup(batch.data(), 0, static_cast<int64_t>(batch.size()), stamp, 0, slots.data());
    read += static_cast<int64_t>(d.missed_rows().size());
    d.reserve(0, stamp, nullptr);  // free slots alone: there are enough
    start_fills(begun_seq_, ticket, stamp);
    drain(begun_seq_);
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
  const auto lock = idle();
  for (const SlotDirectory& d : directories_) d.check();
  std::lock_guard guard(tickets_mutex_);
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
