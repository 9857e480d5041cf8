// LogWriter: sealed blocks on their way to the device.
//
// A stream takes blocks of one size: one is for puts, another for survivors of cleaning. It fills its current segment, then the
// next of those that were made ahead. On a block device its blocks gather in a chunk, which goes out in one large O_DIRECT write
// once it or its segment is full, or a flush comes. On a mapped medium each is stored to its place at once.
//
// What always holds:
//   - a chunk lies in one segment, and stays in that segment's list, where readers find its blocks, until it has been written;
//   - a stream has at most kMostChunks of them; who needs one more waits, with the lock given up;
//   - after a write has failed its chunk stays, so its records are served from it; error() is the first failure, of a write or of the
//     cleaning that feeds them; whoever waits for a buffer is told;
//   - all but on_written is called with the volume's lock held, and what may give it up takes it as an argument.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "io_queue.h"
#include "log_segment.h"
#include "volume.h"

namespace mtrains {

struct LogStream;

struct LogChunk {
  LogStream* stream = nullptr;
  LogSegment* segment = nullptr;
  uint32_t first_block = 0, blocks = 0;
  AlignedBytes buffer;
};

struct LogStream {
  uint32_t block_bytes, chunk_blocks;
  bool survivors;
  uint32_t tables = 0;
  uint64_t promised_blocks = 0;  // to puts under way: each may wait, and others must leave it its room
  std::shared_ptr<LogSegment> current;
  std::deque<std::shared_ptr<LogSegment>> ready;  // made ahead, still empty
  LogChunk* chunk = nullptr;                      // being filled: has a block
  std::vector<std::unique_ptr<LogChunk>> chunks;  // all, with their buffers
  std::vector<LogChunk*> spare;

  uint64_t room_blocks() const;
};

class LogWriter {
 public:
  using Lock = std::unique_lock<std::mutex>;
  using MakeSegment = std::function<std::shared_ptr<LogSegment>(uint32_t block_bytes)>;  // kVolumeFull where there is no room
  struct Block {
    LogSegment& segment;
    uint32_t number;   // in it
    std::byte* bytes;  // where it goes
  };

  LogWriter(std::string volume, const std::vector<VolumeFolder>& folders, std::mutex& mutex, MakeSegment make_segment)
      : volume_(std::move(volume)), folders_(folders), mutex_(mutex), make_segment_(std::move(make_segment)) {}
  void start(IoQueue* queue) { queue_ = queue; }  // null on a mapped medium

  LogStream& stream(uint32_t block_bytes, bool survivors);  // made where there is none
  std::deque<LogStream>& streams() { return streams_; }
  const std::deque<LogStream>& streams() const { return streams_; }
  std::set<uint32_t> filling() const;  // the segments that streams have

  void wait_for_buffer(LogStream& stream, Lock& lock);  // throws where there will be none
  Block next_block(LogStream& stream);                  // after it, and with the lock held ever since
  void end_block(LogStream& stream);                    // its bytes are there
  void dispatch();                                      // chunks that are not full too
  void wait_for_writes(Lock& lock);
  bool idle() const;  // no chunk is being filled or written
  void on_written(LogChunk& chunk, int error);
  static const std::byte* in_memory(const LogSegment& segment, uint32_t block);  // null where the device alone has it

  const std::string& error() const { return error_; }  // empty: none
  void fail(std::string what);
  void require_sound() const;  // kVolumeIo
  void clear_error() { error_.clear(); }

  void reset();  // streams lose their segments, and chunks their blocks; no write is in flight
  void close() { closed_ = true; }
  void add_to(VolumeStats& stats) const;

 private:
  void next_segment(LogStream& stream);
  void begin_chunk(LogStream& stream);  // in its current segment
  void dispatch(LogStream& stream);

  const std::string volume_;
  const std::vector<VolumeFolder>& folders_;
  std::mutex& mutex_;
  const MakeSegment make_segment_;
  IoQueue* queue_ = nullptr;
  std::deque<LogStream> streams_;
  size_t writing_ = 0;  // chunks
  uint64_t ios_ = 0, bytes_ = 0;
  std::string error_;
  bool closed_ = false;
  std::condition_variable written_;
};

}  // namespace mtrains
