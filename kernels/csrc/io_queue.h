// IoQueue: one thread that keeps an engine busy with the jobs given to it, in order, and calls a handler for each.
//
// Reads land in buffers of the queue (one a command in flight), lent to the handler for the length of its call; writes come
// from the caller's buffers, which must stay until the handler has been called. The thread sleeps when there is nothing to
// do; while anything is in flight it waits for completions, and new jobs join then.
//
// The beginnings of those buffers are registered with the engine, where it can: a read is the pages of the records asked for in one
// block, so few are longer. Longer reads, and all of them where registering is refused, go the plain way.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io_engine.h"

namespace mtrains {

struct IoJob {
  bool write;
  int fd;
  uint32_t bytes;
  uint64_t offset;
  std::byte* source;  // of a write
  void* owner;        // the handler's
  uint32_t index;     // the handler's
  // Of a read: the bytes that the handler looks at first, and where it will write them. They are fetched into the processor's caches before.
  struct Ahead {
    uint32_t first = 0, bytes = 0;
    std::byte* to = nullptr;
  } ahead = {};
};

// Of the time that anything was in flight, and of each I/O: their quotient is the mean number in flight.
struct IoTimes {
  double busy_seconds = 0;
  double flight_seconds = 0;
};

class IoQueue {
 public:
  // `data` holds the bytes read (null for a write); `error` is 0, an errno, or kShort.
  using Handler = std::function<void(const IoJob& job, const std::byte* data, int error)>;
  static constexpr int kShort = -1;
  static std::string text_of(int error);
  static constexpr uint32_t kMostBytes = (1u << 20) + (64u << 10);  // of one read
  static constexpr uint32_t kRegisteredBytes = 8u << 10;            // of one buffer: 2 MiB at depth 256

  // backend: "io_uring", "pread", or "" for io_uring where it can be had.
  IoQueue(System& system, const std::string& backend, uint32_t depth, Handler handler);
  ~IoQueue();
  void submit(std::vector<IoJob> jobs);
  const char* backend() const { return backend_; }
  const std::string& fallback_reason() const { return reason_; }
  uint64_t registered_bytes() const { return unregistered_.empty() ? uint64_t{depth_} * kRegisteredBytes : 0; }
  IoTimes times() const { return {double(busy_ns_) * 1e-9, double(flight_ns_) * 1e-9}; }
  const std::string& unregistered_reason() const { return unregistered_; }  // empty where buffers are registered

 private:
  void run(const std::string& backend);
  void start(uint32_t tag);
  void fetch(uint32_t tag) const;
  void finish(uint32_t tag, int32_t result, int64_t now_ns);
  bool take(bool idle);

  System& system_;
  const uint32_t depth_;
  Handler handler_;
  std::unique_ptr<IoEngine> engine_;
  std::byte* buffers_ = nullptr;
  const uint32_t number_;           // in a trace
  std::vector<IoJob> flying_;       // by tag
  std::vector<int64_t> started_ns_;  // by tag
  int64_t busy_since_ns_ = 0;
  std::atomic<int64_t> busy_ns_{0}, flight_ns_{0};
  std::vector<uint32_t> free_tags_;
  std::deque<std::vector<IoJob>> ready_;  // the thread's own
  size_t next_ = 0;                       // into ready_.front()
  std::deque<std::vector<IoJob>> arrived_;
  bool stop_ = false, started_ = false;
  const char* backend_ = "";
  std::string reason_, failure_, unregistered_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
};

}  // namespace mtrains
