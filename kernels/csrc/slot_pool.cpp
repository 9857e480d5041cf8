#include "slot_pool.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "errors.h"
#include "trace.h"

namespace mtrains {

SlotPool::SlotPool(std::vector<SlotPoolTable> tables, std::vector<int32_t> table_of_feature, uint32_t batch_limit)
    : tables_(std::move(tables)), table_of_feature_(std::move(table_of_feature)), batch_limit_(batch_limit),
      stats_(tables_.size()), hands_(tables_.size(), 0) {
  directories_.reserve(tables_.size());
  for (const SlotPoolTable& t : tables_) directories_.emplace_back(t.rows, t.pool_rows);
  for (const int32_t t : table_of_feature_) features_.push_back({tables_[t].name, tables_[t].rows});
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
  CheckedBatch ids = checked(batch, features_);
  std::lock_guard lock(tickets_mutex_);
  if (!announced_.empty() && last_announced_ + 1 - announced_.begin()->first >= 64) return 0;
  const uint64_t number = ++last_announced_;
  announced_.emplace(number, std::move(ids));
  tasks_->post([this, number] {
    std::lock_guard rows(mutex_);
    const CheckedBatch* mine;
    {
      std::lock_guard guard(tickets_mutex_);
      const auto at = announced_.find(number);
      if (at == announced_.end()) return;  // withdrawn
      mine = &at->second;
    }
    mine->by_feature([&](size_t f, const auto* ids, int64_t begin, int64_t end) {
      const size_t t = table_of(f);
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
  CheckedBatch mine;
  {
    std::lock_guard lock(tickets_mutex_);
    const auto at = announced_.find(announced);
    if (at == announced_.end()) return;
    mine = at->second;
  }
  mine.by_feature([&](size_t f, const auto* ids, int64_t begin, int64_t end) {
    directories_[table_of(f)].withdraw(ids, begin, end, bit_of(announced));
  });
  end_announced(announced);
}

// -- batches

uint64_t SlotPool::add_ticket(Ticket ticket, uint64_t lost) {
  const uint64_t seq = ++last_seq_;
  if (const auto at = gave_way_.find(lost); at != gave_way_.end()) ticket.standing = at->second;
  if (ticket.standing.turn == 0) ticket.standing.turn = seq;
  tickets_.emplace(seq, std::move(ticket));
  return seq;
}

void SlotPool::give_way(uint64_t seq) {
  const auto at = tickets_.find(seq);
  gave_way_[seq] = at->second.standing;
  tickets_.erase(at);
}

uint64_t SlotPool::prefetch(const Batch& batch, int64_t* slots, bool dirty, uint64_t announced, uint64_t lost) {
  Ticket ticket{Stage::kQueued, false, checked(batch, features_), slots, dirty, {announced}, {}};
  std::lock_guard lock(tickets_mutex_);
  const uint64_t seq = add_ticket(std::move(ticket), lost);
  gave_way_.erase(lost);
  tasks_->post([this, seq] { begin_queued(seq); });
  return seq;
}

void SlotPool::begin_queued(uint64_t seq) {
  std::lock_guard lock(mutex_);
  Ticket* mine;
  bool in_turn;
  {
    std::lock_guard guard(tickets_mutex_);
    const auto at = tickets_.find(seq);
    if (at == tickets_.end()) return;  // released
    mine = &at->second;
    mine->stage = Stage::kBeginning;
    const auto before = [turn = mine->standing.turn](const auto& other) { return other.second.turn < turn; };
    in_turn = std::none_of(gave_way_.begin(), gave_way_.end(), before);
  }
  bool begun = false;
  try {
    begun = in_turn && look_up(seq, *mine);
  } catch (const Error&) {  // the forward does the work, and meets the error where it can be told
  }
  if (!begun) {
    std::lock_guard guard(tickets_mutex_);
    give_way(seq);
    ++declined_;
  }
  stage_changed_.notify_all();
}

uint64_t SlotPool::begin(const Batch& batch, int64_t* slots, bool dirty, uint64_t announced, uint64_t lost) {
  Ticket ticket{Stage::kBeginning, true, checked(batch, features_), slots, dirty, {announced}, {}};
  const auto lock = idle();
  uint64_t seq;
  Ticket* mine;
  {
    std::lock_guard guard(tickets_mutex_);
    seq = add_ticket(std::move(ticket), lost);
    mine = &tickets_.at(seq);
  }
  try {
    look_up(seq, *mine);
  } catch (...) {
    withdraw_locked(announced);
    std::lock_guard guard(tickets_mutex_);
    if (const auto at = gave_way_.find(lost); at != gave_way_.end()) at->second = mine->standing;
    tickets_.erase(seq);
    throw;
  }
  std::lock_guard guard(tickets_mutex_);
  gave_way_.erase(lost);
  return seq;
}

bool SlotPool::look_up(uint64_t seq, Ticket& ticket) {
  const TraceSpan span("look up", static_cast<uint64_t>(ticket.ids.batch.id_count));
  renumber_if_due(seq);
  const Stamp stamp = stamp_of(seq, ticket.dirty);
  const uint64_t bit = bit_of(ticket.standing.announced);
  std::vector<int64_t> unique(tables_.size(), 0);
  ticket.ids.by_feature([&](size_t f, const auto* ids, int64_t begin, int64_t end) {
    const size_t t = table_of(f);
    unique[t] += directories_[t].lookup(ids, begin, end, stamp, bit, ticket.slots);
  });
  try {
    if (!reserve_all(ticket, stamp)) {
      rollback(ticket);
      return false;
    }
    for (size_t t = 0; t < tables_.size(); ++t) evict_victims(t);
  } catch (...) {
    rollback(ticket);
    throw;
  }
  if (ticket.standing.announced) end_announced(std::exchange(ticket.standing.announced, 0));
  for (size_t t = 0; t < tables_.size(); ++t) {
    const auto missed = static_cast<int64_t>(directories_[t].missed_rows().size());
    if (ticket.standing.counted) {
      stats_[t].refetched_rows += missed;
      continue;
    }
    ++stats_[t].batches;
    stats_[t].unique_rows += unique[t] + missed;
    stats_[t].misses += missed;
  }
  for (size_t f = 0; !ticket.standing.counted && f < table_of_feature_.size(); ++f) {
    stats_[table_of(f)].lookups += ticket.ids.bounds[f + 1] - ticket.ids.bounds[f];
  }
  ticket.standing.counted = true;
  begun_seq_ = seq;
  start_fills(seq, ticket, stamp);
  {
    std::lock_guard guard(tickets_mutex_);
    ticket.stage = Stage::kBegun;
  }
  set_filled();
  return true;
}

void SlotPool::rollback(const Ticket& ticket) {
  for (SlotDirectory& d : directories_) d.rollback();
  if (!ticket.standing.announced) return;
  ticket.ids.by_feature([&](size_t f, const auto* ids, int64_t begin, int64_t end) {  // the lookup took it for begun
    directories_[table_of(f)].announce(ids, begin, end, bit_of(ticket.standing.announced));
  });
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
    if (table_of(f) != table) continue;
    ticket.each_slot(f, [&](int32_t slot) {
      if (slot >= 0) flags[slot] = 1;
    });
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
  give_way(youngest);
  ++revoked_;
  return true;
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
      SlotDirectory& d = directories_[table_of(f)];
      mine->each_slot(f, [&](int32_t slot) { d.mark_dirty(slot); });
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
  stage_changed_.wait(lock, [&] {
    at = tickets_.find(seq);
    return at == tickets_.end() || at->second.stage != Stage::kBeginning;
  });
  const auto gone = gave_way_.find(seq);
  if (gone != gave_way_.end() || (at != tickets_.end() && at->second.stage == Stage::kQueued)) {
    const uint64_t announced = gone != gave_way_.end() ? gone->second.announced : at->second.standing.announced;
    gave_way_.erase(seq);
    tickets_.erase(seq);
    lock.unlock();
    if (!announced) return;
    std::lock_guard rows(mutex_);
    withdraw_locked(announced);
    return;
  }
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
  gave_way_.erase(seq);  // it has, meanwhile
}

bool SlotPool::alive(uint64_t seq) const {
  std::lock_guard lock(tickets_mutex_);
  return tickets_.contains(seq);
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
      const SlotDirectory& d = directories_[table_of(f)];
      ticket.each_slot(f, [&](int32_t slot) {
        if (d.row_of_slot(slot) < 0) throw std::logic_error("slot pool: a pinned slot is free");
      });
    }
  }
}

}  // namespace mtrains
