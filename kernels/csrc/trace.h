// Trace: what native threads and devices did and when, recorded while somebody asks for it.
//
// One for the process. Off, a span costs one relaxed load. On, each adds an event to a list under a lock; the list holds as many as
// was said, and counts what came after. Times are of std::chrono::steady_clock, Python's time.perf_counter_ns on Linux.
//
// An event belongs to a lane, on which events nest: a thread (its kernel id), or one of a queue's places for I/O in flight.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <vector>

namespace mtrains {

struct TraceEvent {
  const char* what;  // a literal
  int64_t begin_ns;
  int64_t end_ns;
  uint64_t count;    // rows, or bytes of I/O
  uint32_t queue;    // 0: a thread's event; else the number of an I/O queue
  uint32_t lane;     // the thread, or the place in the queue
};

class Trace {
 public:
  static Trace& shared();
  static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  bool on() const { return on_.load(std::memory_order_relaxed); }
  bool start(size_t most_events);  // false: it is on already
  std::vector<TraceEvent> stop(uint64_t* dropped);
  void add(const TraceEvent& event);

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::vector<TraceEvent> events_;
  size_t most_ = 0;
  uint64_t dropped_ = 0;
};

// From here to the end of the scope, on this thread.
class TraceSpan {
 public:
  explicit TraceSpan(const char* what, uint64_t count = 0) : what_(what), count_(count), begin_ns_(Trace::shared().on() ? Trace::now_ns() : 0) {}
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;
  ~TraceSpan() { if (begin_ns_) end(); }

 private:
  void end();
  const char* what_;
  uint64_t count_;
  int64_t begin_ns_;
};

}  // namespace mtrains
