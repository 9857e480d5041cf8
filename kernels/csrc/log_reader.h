// LogReader: batches of records that are read from the device.
//
// The records of a batch become one read a block, of the pages that hold them. The queue's thread verifies each, that it is the row
// asked for, and scatters it to the request's parts. Of the other records in those pages it keeps the wanted ones, as neighbours.
//
// What always holds:
//   - nothing is scattered that has not been verified; what fails fails the batch, whose first error counts. A damaged neighbour is
//     left out;
//   - a descriptor stays open while reads may use it: segments that are removed meanwhile are buried, until every batch submitted
//     before is over;
//   - a batch is its waiter's as soon as its last read is counted: the queue's thread touches nothing of it afterwards;
//   - its lock is taken last, after the volume's or alone, and nothing is called with it held.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "errors.h"
#include "io_queue.h"
#include "log_segment.h"
#include "log_table.h"
#include "volume.h"

namespace mtrains {

struct ReadBatch {
  struct Item {
    uint64_t place;
    uint32_t request, at;  // rows[at] of that request
  };
  struct Read {
    uint32_t first_item, items, skipped_bytes;  // the read begins that far into the block
  };
  std::vector<GetRequest> requests;
  std::vector<LogTable*> tables;  // by request
  std::vector<Item> items;        // by place, once submitted
  std::vector<Read> reads;
  Neighbours neighbours;  // that were newest when they were written
  std::vector<uint64_t> neighbour_places;
  std::atomic<size_t> left{0};  // reads
  std::function<void()> ready;  // for the last of them to call
  std::string error;            // the first one
  ErrorKind error_kind{};
  void fail(ErrorKind kind, std::string what) {
    if (!error.empty()) return;
    error = std::move(what);
    error_kind = kind;
  }
};

class LogReader {
 public:
  explicit LogReader(std::string volume) : volume_(std::move(volume)) {}
  void start(IoQueue* queue) { queue_ = queue; }  // null on a mapped medium, where no batch has items

  // Returns the batch's token. `segments`: all that items lie in.
  uint64_t submit(std::unique_ptr<ReadBatch> batch, const LogSegments& segments, std::function<void()> ready);
  std::unique_ptr<ReadBatch> wait(uint64_t token);  // throws what failed
  void wait_for_all();                              // reads; their batches stay, for their waiters
  bool idle() const;                                // every batch was waited for
  void on_read(const IoJob& job, const std::byte* data, int error);

  // Keeps removed segments open for reads in flight. Returns those that no read needs any more, to be closed without a lock.
  std::vector<std::shared_ptr<LogSegment>> bury(std::span<const std::shared_ptr<LogSegment>> removed);
  void add_to(VolumeStats& stats) const;

 private:
  struct Grave {
    std::shared_ptr<LogSegment> segment;
    uint64_t last_batch;  // that may read from it
  };
  static std::vector<IoJob> plan(ReadBatch& batch, const LogSegments& segments);
  static void keep_wanted(ReadBatch& batch, const ReadBatch::Read& read, const std::byte* data, uint32_t bytes);

  const std::string volume_;
  IoQueue* queue_ = nullptr;
  std::map<uint64_t, std::unique_ptr<ReadBatch>> batches_;  // by token
  uint64_t last_batch_ = 0;
  std::vector<Grave> graves_;
  uint64_t ios_ = 0, bytes_ = 0;
  double wait_seconds_ = 0;
  mutable std::mutex mutex_;
  std::condition_variable done_;
};

}  // namespace mtrains
