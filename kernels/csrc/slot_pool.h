// SlotPool: the slot pools of all tables of one TBE, and the tickets that move batches through them.
//
// A ticket is one batch: its ids turned into slots, its missing rows on their way into slots. It is
//   soft      from prefetch to forward: the youngest are revoked when a forward needs room;
//   hard      from forward to the end of its backward: never revoked, its slots are never victims;
//   released  gone. Releasing twice is harmless.
// Tickets are numbered by `seq`, which grows by one a batch; 0 is no ticket. The slots array that a ticket was begun
// with belongs to the caller and must outlive the ticket: it is the exact list of what the ticket pins.
//
// What always holds:
//   - a failed begin (id out of range, no room, volume full) changes nothing that a reader or trainer can see;
//   - a victim is evicted into its volume before its slot is given away;
//   - fills complete in the order of begin; a slot whose fill is pending is pinned by the ticket that asked for it;
//   - if a fill fails, the rows of the volume that failed leave the pool again, and every soft ticket that could have used
//     them is revoked.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "slot_directory.h"
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
  int64_t lookups = 0;      // ids looked up
  int64_t unique_rows = 0;  // distinct rows, batch by batch
  int64_t misses = 0;       // of these, not resident when their batch began
  int64_t evictions = 0;
  int64_t write_backs = 0;  // of these, dirty: put into the home
  int64_t flushed_rows = 0;
  int64_t trickled_rows = 0;  // dirty rows put into the home between checkpoints, still resident
};

// The ids of one batch, feature by feature: feature f holds ids[offsets[f * stride]] up to ids[offsets[(f + 1) * stride]].
struct Batch {
  const void* ids;
  bool ids_are_int32;
  const void* offsets;
  bool offsets_are_int32;
  int64_t stride;
  int64_t id_count;
};

class SlotPool {
 public:
  SlotPool(std::vector<SlotPoolTable> tables, std::vector<int32_t> table_of_feature, uint32_t batch_limit);
  ~SlotPool();

  // Prefetch: returns 0 when there is no room now; the forward will then do the work. Forward: revokes soft tickets,
  // the youngest first, and throws kPoolTooSmall when hard tickets alone leave no room.
  uint64_t begin(const Batch& batch, int64_t* slots, bool hard, bool dirty);
  bool acquire(uint64_t seq, bool dirty);  // soft -> hard; false when it was revoked
  void wait(uint64_t seq);                 // every fill up to this ticket's is in its slots
  void release(uint64_t seq) noexcept;
  bool alive(uint64_t seq) const;

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
  int64_t revoked() const { std::lock_guard lock(mutex_); return revoked_; }
  int64_t declined() const { std::lock_guard lock(mutex_); return declined_; }
  int64_t outstanding() const { std::lock_guard lock(mutex_); return static_cast<int64_t>(tickets_.size()); }
  int32_t slot_of_row(size_t table, int64_t row) const { std::lock_guard lock(mutex_); return directories_[table].slot_of_row(row); }
  void check() const;

 private:
  struct Ticket {
    bool hard;
    const int64_t* slots;
    std::vector<int64_t> bounds;  // by feature, into slots
  };
  struct Fill {
    struct Read {
      Volume* volume;
      uint64_t token;
      std::vector<std::pair<size_t, std::vector<int32_t>>> slots;  // by table
    };
    uint64_t seq;
    std::vector<Read> reads;  // one a volume
  };

  std::vector<int64_t> bounds_of(const Batch& batch) const;
  void check_ids(const Batch& batch, const std::vector<int64_t>& bounds) const;
  Stamp stamp_of(uint64_t seq, bool dirty) const { return Stamp::of(static_cast<uint32_t>(seq - base_), dirty); }
  uint32_t oldest_outstanding() const;
  uint64_t next_seq();
  bool reserve_all(const Ticket& mine, Stamp stamp, bool hard);
  bool reserve_exactly(size_t table, const Ticket& mine, Stamp stamp);
  [[noreturn]] void refuse(size_t table, const Ticket& mine) const;
  size_t pinned_by_others(size_t table, const Ticket& mine, std::vector<uint8_t>& pinned) const;
  void mark_slots(size_t table, const Ticket& ticket, std::vector<uint8_t>& flags) const;
  bool revoke_youngest();
  void evict_victims();
  void start_fills(uint64_t seq, Stamp stamp, int64_t* slots, bool dirty);
  std::exception_ptr finish(const Fill& fill);  // the first error, if any
  void abandon(const Fill::Read& read);         // its rows leave the pool
  void finish_oldest_fill();
  void drain(uint64_t up_to_seq);
  void rollback();
  void require_rows(size_t table, int64_t first_row, int64_t count) const;

  std::vector<SlotPoolTable> tables_;
  std::vector<int32_t> table_of_feature_;
  uint32_t batch_limit_;
  std::vector<SlotDirectory> directories_;
  std::vector<SlotPoolStats> stats_;
  std::vector<int32_t> hands_;  // by table: the slot where trickle goes on
  std::map<uint64_t, Ticket> tickets_;  // outstanding
  std::deque<Fill> fills_;              // pending, oldest first
  uint64_t last_seq_ = 0;
  uint64_t base_ = 0;  // batch numbers in stamps count from here
  int64_t revoked_ = 0, declined_ = 0;
  mutable std::mutex mutex_;
};

}  // namespace mtrains
