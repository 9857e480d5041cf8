// The seam to the operating system's block I/O: what an engine does with reads and writes of aligned buffers.
//
// One thread (io_queue.cpp) owns an engine and calls it; engines need no locks of their own towards it.
//
// Registered buffers are pinned and mapped by the kernel once, not at every read: 2.12 instead of 2.60 µs of CPU a read of 4 KiB
// (6 interleaved rounds at depth 128, Linux 6.18). Registered files, measured beside them, saved nothing (2.66 and 2.60 alone,
// 2.12 and 2.12 with buffers), and would hold removed segments' space: there are none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "system.h"

namespace mtrains {

struct IoCommand {
  bool write;
  int fd;
  uint32_t bytes;
  uint64_t offset;
  std::byte* buffer;
};

struct IoCompletion {
  uint32_t tag;
  int32_t result;  // bytes moved, or -errno
};

// Where reads land again and again: for each tag, the first `bytes` at first + tag * stride.
struct IoBuffers {
  std::byte* first;
  size_t stride;
  size_t bytes;
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;
  virtual const char* name() const = 0;
  // Before the first start: reads of a tag into its buffer may then cost less. Returns why they will not; empty if they will.
  virtual std::string register_buffers(const IoBuffers& buffers) = 0;
  // At most `depth` commands are between start and their completion; `tag` is below depth and names this one.
  virtual void start(const IoCommand& command, uint32_t tag) = 0;
  // Hands over what was started and returns completions: at least `least` of them, without blocking if least is 0.
  virtual size_t reap(std::span<IoCompletion> out, size_t least) = 0;
};

// io_uring, or null with the reason where it was not built in or the kernel forbids it. Must be called on the thread that
// will use the engine.
std::unique_ptr<IoEngine> make_uring_engine(uint32_t depth, std::string* reason);

// A pool of threads that call the system's pread and pwrite.
std::unique_ptr<IoEngine> make_pread_engine(uint32_t depth, System& system);

}  // namespace mtrains
