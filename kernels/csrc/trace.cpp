#include "trace.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

namespace mtrains {

Trace& Trace::shared() {
  static auto* const trace = new Trace;  // threads may outlive the end of the process
  return *trace;
}

bool Trace::start(size_t most_events) {
  std::lock_guard lock(mutex_);
  if (on()) return false;
  most_ = most_events;
  dropped_ = 0;
  events_.clear();
  on_ = true;
  return true;
}

std::vector<TraceEvent> Trace::stop(uint64_t* dropped) {
  std::lock_guard lock(mutex_);
  on_ = false;
  *dropped = dropped_;
  return std::exchange(events_, {});
}

void Trace::add(const TraceEvent& event) {
  std::lock_guard lock(mutex_);
  if (!on()) return;
  if (events_.size() < most_) events_.push_back(event);
  else ++dropped_;
}

void TraceSpan::end() {
  Trace::shared().add({what_, begin_ns_, Trace::now_ns(), count_, 0, static_cast<uint32_t>(syscall(SYS_gettid))});
}

}  // namespace mtrains
