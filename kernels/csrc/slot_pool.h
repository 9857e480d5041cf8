// SlotPool: the slot pools of all tables of one TBE, and the tickets that move batches through them.
//
// A ticket is one batch: its ids turned into slots, its missing rows on their way into slots. It is
//   queued    from prefetch until the task thread (task_queue.h) has looked it up: it holds nothing yet;
//   soft      from then to forward: the youngest are revoked when a forward needs room;
//   hard      from forward to the end of its backward: never revoked, its slots are never victims;
//   released  gone. Releasing twice is harmless.
// A queued ticket that finds no room gives way, and so does a soft one that is revoked: it is gone, and its batch begins anew, which is
// counted once. Until then no later one is prefetched: it would take the room that this one waits for, and lose it to its forward.
// Tickets are numbered by `seq`, which grows by one a batch; 0 is no ticket. The ids that a ticket was begun with, and its slots
// array, belong to the caller and must outlive the ticket: the array is the exact list of what the ticket pins. Where every pool has a
// slot for each of its rows, ids are slots, and there need be no array (null).
//
// A batch may be announced long before that: at most 64 are, announced and not begun. What for: eviction_order.h. Rows that
// announced batches will use and that come along with a read (Neighbours in volume.h) are admitted when the read completes, where
// that drives out none that is used sooner.
//
// What always holds:
//   - a failed begin (id out of range, no room, volume full) changes nothing that a reader or trainer can see;
//   - batches are looked up in the order of prefetch and begin;
//   - a victim is evicted into its volume before its slot is given away;
//   - fills complete in the order of begin; a slot whose fill is pending is pinned by the ticket that asked for it;
//   - if a fill fails, the rows of the volume that failed leave the pool again, every soft ticket that could have used them is
//     revoked, and every hard one gets the error from its wait;
//   - between the completion of a read and the admission of what came along, no other row comes or goes: so what came is current.
//
// Two locks, in this order: mutex_ for rows, slots and fills, held by the task thread for the whole of a lookup; tickets_mutex_, always
// short, for tickets, so that a training thread whose rows are there need not wait for the lookup of a coming batch.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "checked_batch.h"
#include "slot_directory.h"
#include "task_queue.h"
#include "volume.h"

namespace mtrains {

struct SlotPoolTable {
  std::string name;
  Volume* volume;
  TableId id;
  int64_t rows;
  int32_t pool_rows;
  std::vector<Part> parts;  // the pool's arrays, one element a slot
};

struct SlotPoolStats {
  int64_t batches = 0;
  int64_t lookups = 0;      // ids looked up
  int64_t unique_rows = 0;  // distinct rows, batch by batch
  int64_t misses = 0;       // of these, not resident when their batch began
  int64_t refetched_rows = 0;  // not resident when their batch began anew
  int64_t admitted_rows = 0;  // that came along with others' reads
  int64_t evictions = 0;
  int64_t write_backs = 0;  // of these, dirty: put into the home
  int64_t flushed_rows = 0;
  int64_t trickled_rows = 0;  // dirty rows put into the home between checkpoints, still resident
};

class SlotPool {
 public:
  SlotPool(std::vector<SlotPoolTable> tables, std::vector<int32_t> table_of_feature, uint32_t batch_limit);
  ~SlotPool();

  // The rows of a coming batch: advice for evictions. Returns its number, or 0: 64 are announced, and nothing was done. Ids
  // must stay until the batch begins or is withdrawn.
  uint64_t announce(const Batch& batch);
  void withdraw(uint64_t announced);  // it will not come after all

  // Starts a batch on the task thread. Where it gives way, acquire says so, and the forward does the work. `lost`: the ticket that this
  // batch had, which gave way (alive says so), or 0; what was announced for it still is, and is not given again.
  uint64_t prefetch(const Batch& batch, int64_t* slots, bool dirty, uint64_t announced, uint64_t lost);
  // Starts a batch for a forward, after all that were prefetched: revokes soft tickets, the youngest first, and throws
  // kPoolTooSmall when hard tickets alone leave no room.
  uint64_t begin(const Batch& batch, int64_t* slots, bool dirty, uint64_t announced, uint64_t lost);
  bool acquire(uint64_t seq, bool dirty);  // soft -> hard; false when it gave way
  void wait(uint64_t seq);                 // every fill up to this ticket's is in its slots
  void release(uint64_t seq) noexcept;
  bool alive(uint64_t seq) const;
  bool full() const { return full_; }  // every row of every table is in its slot, or on its way there

  void flush();  // puts every dirty row; rows that an outstanding ticket may still change stay dirty
  // Puts dirty rows that no batch has used for `min_age` batches, among the `looks` slots where a hand that goes round the
  // pool comes next. They stay resident, clean. Returns the rows put.
  int64_t trickle(size_t table, uint32_t min_age, uint32_t looks);
  void read(size_t table, int64_t first_row, int64_t count, const std::vector<Part>& to);
  void write(size_t table, int64_t first_row, int64_t count, const std::vector<Part>& from);  // base null: keep

  void forget();  // every row leaves its pool unwritten; refused while tickets are outstanding

  // Warm restart: the resident rows in the order of eviction, and rows in that order read into slots that are free.
  std::vector<int64_t> resident_rows(size_t table) const;
  int64_t warm(size_t table, std::span<const int64_t> rows);  // returns the rows read: the last ones, where room is short

  SlotPoolStats stats(size_t table) const;
  int32_t resident(size_t table) const { std::lock_guard lock(mutex_); return directories_[table].resident(); }
  int64_t announced() const { std::lock_guard lock(tickets_mutex_); return static_cast<int64_t>(announced_.size()); }
  int64_t revoked() const { const auto lock = idle(); return revoked_; }
  int64_t declined() const { const auto lock = idle(); return declined_; }
  int64_t outstanding() const { std::lock_guard lock(tickets_mutex_); return static_cast<int64_t>(tickets_.size()); }
  int32_t slot_of_row(size_t table, int64_t row) const { std::lock_guard lock(mutex_); return directories_[table].slot_of_row(row); }
  void check() const;

 private:
  enum class Stage { kQueued, kBeginning, kBegun };
  struct Standing {          // of a batch, which it keeps when its ticket gives way
    uint64_t announced;      // and not begun, or 0
    uint64_t turn = 0;       // the number of its first ticket
    bool counted = false;
  };
  struct Ticket {
    Stage stage;
    bool hard;
    CheckedBatch ids;
    int64_t* slots;  // one an id; null: the ids
    bool dirty;
    Standing standing;
    std::exception_ptr error;  // of a fill that it needs

    // with_slot(slot), of every id of the feature; while it is looked up, slots of rows that it misses may be negative.
    template <class Do>
    void each_slot(size_t feature, Do&& with_slot) const {
      ids.of_feature(feature, [&](const auto* of, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) with_slot(static_cast<int32_t>(slots ? slots[i] : of[i]));
      });
    }
  };
  struct Fill {
    struct Read {
      Volume* volume;
      uint64_t token;
      std::vector<std::pair<size_t, std::vector<int32_t>>> slots;  // by table, in the order of the requests
    };
    uint64_t seq;
    std::vector<Read> reads;  // one a volume
    std::shared_ptr<std::atomic<size_t>> unready;  // reads in flight
  };

  Stamp stamp_of(uint64_t seq, bool dirty) const { return Stamp::of(static_cast<uint32_t>(seq - base_), dirty); }
  size_t table_of(size_t feature) const { return static_cast<size_t>(table_of_feature_[feature]); }
  std::unique_lock<std::mutex> idle() const;  // what was prefetched has begun
  uint32_t oldest_outstanding() const;
  void renumber_if_due(uint64_t seq);
  uint64_t add_ticket(Ticket ticket, uint64_t lost);
  void begin_queued(uint64_t seq);
  void give_way(uint64_t seq);
  bool look_up(uint64_t seq, Ticket& ticket);
  uint64_t bit_of(uint64_t announced) const;
  void end_announced(uint64_t announced);
  void set_first_announced();
  void withdraw_locked(uint64_t announced);
  bool reserve_all(const Ticket& mine, Stamp stamp);
  bool reserve_each(const Ticket& mine, Stamp stamp);
  bool reserve_exactly(size_t table, const Ticket& mine, Stamp stamp);
  [[noreturn]] void refuse(size_t table, const Ticket& mine) const;
  size_t pinned_by_others(size_t table, const Ticket& mine, std::vector<uint8_t>& pinned) const;
  void mark_slots(size_t table, const Ticket& ticket, std::vector<uint8_t>& flags) const;
  bool revoke_youngest();
  void evict_victims(size_t table);
  void start_fills(uint64_t seq, const Ticket& ticket, Stamp stamp);
  static uint64_t rows_of(const Fill& fill);
  std::exception_ptr finish(const Fill& fill);  // the first error, if any
  void admit(const Fill::Read& read, const Neighbours& neighbours);
  void abandon(const Fill::Read& read);         // its rows leave the pool
  void finish_oldest_fill();
  void finish_ready_fills();
  void set_filled();
  void drain(uint64_t up_to_seq);
  void rollback(const Ticket& ticket);
  void require_rows(size_t table, int64_t first_row, int64_t count) const;

  std::vector<SlotPoolTable> tables_;
  std::vector<int32_t> table_of_feature_;
  std::vector<FeatureTable> features_;
  uint32_t batch_limit_;
  std::vector<SlotDirectory> directories_;
  std::vector<SlotPoolStats> stats_;
  std::vector<int32_t> hands_;  // by table: the slot where trickle goes on
  std::deque<Fill> fills_;              // pending, oldest first
  uint64_t begun_seq_ = 0;              // the last one that was looked up
  uint64_t base_ = 0;                   // batch numbers in stamps count from here
  int64_t revoked_ = 0, declined_ = 0;
  bool reserving_ = false;  // a lookup has misses and victims in hand: nothing is admitted to its directories
  std::atomic<uint64_t> filled_seq_{0};  // every fill up to this one's is in its slots
  std::atomic<bool> full_{false};
  mutable std::mutex mutex_;

  std::map<uint64_t, Ticket> tickets_;  // outstanding
  std::map<uint64_t, CheckedBatch> announced_;  // and not begun
  std::map<uint64_t, Standing> gave_way_;  // whose batches have not begun anew
  uint64_t last_seq_ = 0, last_announced_ = 0;
  std::condition_variable stage_changed_;
  mutable std::mutex tickets_mutex_;

  const std::shared_ptr<TaskQueue> tasks_ = std::make_shared<TaskQueue>();
};

}  // namespace mtrains
