// LogVolume: a log-structured store of fixed-size records, on block devices (SsdVolume) or in mapped files (PmemVolume).
// One engine serves all tables of a rank. Its parts and its files:
//
//   LogTable    log_table.*        where the newest record of each row is; open blocks
//   LogWriter   log_writer.*       sealed blocks on their way to the device
//   LogReader   log_reader.*       reads in flight, verified
//   LogVolume   log_volume.cpp     opens and closes, tables
//               log_rows.cpp       puts and gets
//               log_cleaner.cpp    room, and cleaning
//               log_checkpoint.cpp commits and index snapshots
//               log_recovery.cpp   replay, and going back to an epoch
//
// A put goes in pieces of a segment's worth, so that the rows of one make room for the next, however many there are. It copies its
// records into the open block of its table. A full block is sealed: it gets its place in the log (the next block of the current
// segment of its stream), its records their checksums, and it goes to the writer.
//
// Gets look at the index when they are submitted. What is in memory is copied at once; what is on disk is the reader's. When the
// batch is waited for, those of the wanted records that the index still names, and so no newer value exists of, are its neighbours.
//
// A checkpoint seals the open blocks, waits for every write, syncs the segments, and commits a manifest (manifest.h) that
// lists segments and how many of their blocks count. Opening replays the log that the manifest names, from the last index
// snapshot (index_snapshot.h) on; one is written in the background when replaying would take too long. Segments that no kept
// manifest names and that hold no newest record are removed. Opening never goes on in an old segment, so that what a crash
// left behind there can be mistaken for nothing.
//
// Cleaning (a thread of its own) makes such segments: it takes the one with the most room to gain for what is to be copied,
// the older of two alike (what an old segment still holds is seldom replaced), copies its newest records into
// streams of survivors, keeping their sequence, and leaves it without any. One that a kept manifest names is held until
// that manifest goes; the volume then wants a checkpoint. Puts leave a few segments to the cleaner, and wait for it when
// there is no other room.
//
// What always holds:
//   - the files of all segments and manifests never exceed capacity_bytes: each piece of a put makes sure of room before it changes
//     anything, for every block that is open then; a put that is refused may have stored the pieces before;
//   - no manifest is committed while a row is given up: its place in the log would be an older value's;
//   - a segment that a kept manifest names is neither removed nor rewritten below the blocks that it names;
//   - after a write has failed its records are still served from memory, and put, flush and checkpoint report it;
//   - a restore changes nothing on disk before it has loaded the epoch; one that fails leaves nothing in memory, and the volume refuses
//     all but another restore;
//   - after an fsync has failed nothing is committed any more: what the kernel dropped cannot be known.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io_queue.h"
#include "log_format.h"
#include "log_reader.h"
#include "log_segment.h"
#include "log_table.h"
#include "log_writer.h"
#include "manifest.h"
#include "volume.h"

namespace mtrains {

struct LogOptions {
  std::vector<std::string> paths;
  uint64_t capacity_bytes = 0;
  uint32_t keep_checkpoints = 2;
  std::string backend;  // "io_uring", "pread", or "" for the best there is
  uint32_t depth = 256;
  bool mapped = false;
  bool read_only = false;  // no lock, no changes: the state of `epoch`, whatever the writer does meanwhile
  std::optional<uint64_t> epoch;                    // to open at; the newest otherwise
  uint64_t snapshot_after_bytes = uint64_t{8} << 30;  // of log to replay: about 10 s at 0.8 GB/s (bench: store.py, open)
  std::shared_ptr<System> system;                   // null: the real one
};

struct TableInfo {
  TableSpec spec;
  int64_t live_rows;
};

struct SegmentInfo {
  uint32_t number, path_index, block_bytes, blocks, kept;
  uint64_t live_bytes, bytes;
};

class LogVolume final : public Volume {
 public:
  explicit LogVolume(LogOptions options);
  ~LogVolume() override;

  TableId table(const TableSpec& spec, const Initializer& init) override;
  void put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots,
           std::span<const Part> parts) override;
  uint64_t submit_get(std::vector<GetRequest> requests, std::function<void()> ready = {}) override;
  Neighbours wait(uint64_t token) override;
  void flush() override;
  void checkpoint(uint64_t epoch) override;
  std::vector<uint64_t> epochs() const override;
  void restore(uint64_t epoch) override;
  void withdraw(uint64_t epoch);  // the newest epoch no longer counts; its rows stay as they are
  void await_restore();  // refuse reads and writes until restore()
  void grow(TableId table, int64_t row_count);
  std::vector<TableInfo> tables() const;
  std::vector<SegmentInfo> segments() const;
  VolumeStats stats() const override;
  const char* backend() const override { return queue_ ? queue_->backend() : "mapped"; }
  std::string fallback_reason() const { return queue_ ? queue_->fallback_reason() : ""; }
  std::string unregistered_reason() const { return queue_ ? queue_->unregistered_reason() : ""; }
  bool direct() const;  // whether the page cache is out of the way
  // Room is short, and what checkpoints hold would make some. A wish stands until the next commit. Each look ends a step: what is put
  // from one to the next is what the volume expects of the steps to come.
  bool wants_checkpoint();
  std::string id() const override;
  void close() override;

 private:
  struct Kept {
    uint64_t epoch;
    uint64_t bytes;  // of the manifest
    uint64_t snapshot, snapshot_bytes;
    std::vector<ManifestSegment> segments;
  };
  struct Snapshot {  // of the index; being written, then named by the manifests that follow
    uint64_t epoch;
    struct Covered {
      uint32_t blocks, records;
    };
    std::map<uint32_t, Covered> covered;  // by segment
    size_t table = 0;                     // rows before (table, row) are written
    uint64_t row = 0;
    std::vector<std::map<uint64_t, uint64_t>> before;  // by table: entries of rows not yet written that have changed since
    uint64_t bytes = 0;
    bool cancelled = false;
  };
  using Lock = LogWriter::Lock;
  struct Room {  // in segments; why: docs/checkpoints.md, "How much room"
    uint64_t segments = 0;  // that the capacity has room for
    uint64_t holding = 0;   // there now, those that only wait for a manifest to go left out
    uint64_t balance = 0;   // held at most for cleaning to gain the most
    uint64_t spare = 0;     // free at a step's end, or the volume wants a checkpoint
    double needed = 0;      // bytes of capacity with which it never is full
  };

  void open_existing();
  void open_folders();
  void load(const Manifest& manifest);
  void load_snapshot(const Manifest& manifest);
  void remove_unnamed();  // files that no kept manifest names
  void replay(LogSegment& segment, const ManifestSegment& named, std::vector<LazyArray<uint64_t>>& sequences);
  uint32_t replay_block(const LogSegment& segment, uint32_t block, const std::byte* data, std::vector<LazyArray<uint64_t>>& sequences);
  void count_live();
  void read_blocks(const LogSegment& segment, uint32_t first, uint32_t count, std::byte* to) const;
  bool snapshot_is_due(const Manifest& manifest) const;
  void begin_snapshot(const Manifest& manifest);
  void write_snapshot(const std::shared_ptr<Snapshot>& snapshot);
  void stop_snapshot(Lock& lock);
  void remove_unnamed_snapshots();
  void forget_manifests(Lock& lock);
  LogTable& add_table(const TableSpec& spec, const Initializer& init);

  void require_loaded() const;
  void require_usable() const;
  void require_writable() const;
  void put_piece(LogTable& table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts, Lock& lock);
  uint64_t ensure_room(LogTable& table, size_t rows, Lock& lock);  // returns the blocks that the rows fill
  bool fits(uint64_t more_segments) const;
  uint64_t reserve() const;  // segments that puts leave to the cleaner: one for each stream of survivors that has not half a one left
  std::shared_ptr<LogSegment> make_segment(uint32_t block_bytes);
  void lose(const LogTable& table, uint64_t place);  // the record there is no longer its row's newest
  void keep(const Kept& kept);
  void let_go(const Kept& kept);
  void reclaim(Lock& lock);
  uint64_t used_bytes() const;
  uint64_t used_beside_segments() const;  // by manifests and index snapshots
  uint32_t capacity_blocks(uint32_t block_bytes) const { return static_cast<uint32_t>((segment_bytes_ - kPageBytes) / block_bytes); }
  uint64_t manifest_bytes() const;
  [[noreturn]] void refuse_full() const;

  uint64_t& entry_to_change(LogTable& table, int64_t row);  // a snapshot that is being written gets to know of it
  void finish(ReadBatch& batch);
  void give_up(LogTable& table, int64_t row, uint64_t place);
  std::byte* append(LogTable& table, OpenBlock& open, int64_t row, uint64_t sequence, Lock& lock);  // where the payload goes
  void seal(LogTable& table, OpenBlock& open, Lock& lock);
  void drain(Lock& lock);        // seals and writes everything, and waits for it
  void drain_alone(Lock& lock);  // the same, and nothing has been put since

  void clean();  // the cleaner's thread
  Room room() const;
  bool cleaning_is_due() const;
  bool commit_must_wait() const;
  bool commit_should_wait() const;
  uint64_t held_back() const;    // segments that must be free for one that a manifest names to be cleaned
  uint64_t comfortable() const;  // segments that must be free for a put or a commit not to wait for the cleaner
  bool will_fit(uint64_t segments) const;  // once what is held is given back
  void wait_for_cleaner(size_t& waiting, Lock& lock);
  bool someone_waits() const;
  std::shared_ptr<LogSegment> victim() const;
  bool move_survivors(const std::shared_ptr<LogSegment>& segment);
  void move_block(LogSegment& segment, uint32_t block, const std::byte* data, Lock& lock);
  void stop_cleaner();

  void on_io(const IoJob& job, const std::byte* data, int error);  // on the queue's thread

  const LogOptions options_;
  System& system_;
  const std::string name_;  // its paths
  std::vector<VolumeFolder> folders_;
  VolumeId volume_{};
  uint64_t segment_bytes_ = 0;
  std::deque<LogTable> tables_;  // number - 1
  LogSegments segments_;
  size_t removing_ = 0;  // segments that are no longer in segments_, and still on disk
  std::vector<Kept> kept_;
  std::shared_ptr<Snapshot> named_, snapshot_;  // the one that manifests name; the one that is being written
  std::thread snapshot_writer_;
  uint64_t coming_ = 0;  // segments that hold no newest record and wait for a manifest to go
  uint32_t next_segment_ = 1;
  uint64_t next_sequence_ = 1;
  uint64_t replaced_bytes_ = 0, replaced_before_ = 0;  // by puts, since the last checkpoint and between the two before
  uint64_t step_put_bytes_ = 0;                  // since the last look for a wish
  uint64_t steps_ = 0;                           // looks since the last checkpoint
  uint64_t step_bytes_ = 0, step_bytes_before_ = 0;  // put at most from one look to the next, since the last checkpoint and before
  bool wish_ = false;
  size_t checkpointing_ = 0;  // drain_alone calls: puts wait
  uint64_t live_bytes_ = 0;  // of newest records in sealed blocks
  uint64_t given_up_bytes_ = 0;
  std::string sync_error_;
  bool awaiting_restore_ = false, closed_ = false;
  std::string restore_error_;  // of a restore that has begun and did not come to its end: what is in memory is half an epoch
  bool stop_cleaner_ = false, asked_ = false;
  size_t waiting_puts_ = 0, waiting_commits_ = 0;  // that have asked the cleaner to do what it can
  uint64_t idle_rounds_ = 0;  // times that the cleaner looked and found nothing to do
  VolumeStats stats_;
  mutable std::mutex mutex_;
  std::condition_variable drained_, cleaner_wake_, room_made_;
  std::mutex commit_mutex_;  // one checkpoint, restore, withdrawal, growth or close at a time
  std::mutex moving_mutex_;  // none of these while a piece is cleaned; but a checkpoint that has drained, and syncs, lets cleaning go on
                             // order: commit_mutex_, moving_mutex_, mutex_

  LogWriter writer_;
  LogReader reader_;
  std::unique_ptr<IoQueue> queue_;  // after the rest: its thread uses it
  std::thread cleaner_;
};

}  // namespace mtrains
