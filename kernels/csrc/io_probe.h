// What a device can do with nothing above it: random aligned reads and writes through an engine, kept at one depth.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mtrains {

struct IoProbe {
  uint64_t operations;
  double seconds;
  double cpu_seconds;  // of the calling thread
  double latency_us_p50, latency_us_p99;
};

// Works on `files` (opened with O_DIRECT where the file system has it) for about `seconds`: `block_bytes` at random multiples of it in
// all of them together, up to the first hole of each, of which the share `read_share` is read and the rest overwritten with noise. backend as in IoQueue.
IoProbe random_io(const std::vector<std::string>& files, uint32_t block_bytes, uint32_t depth, double read_share, double seconds,
                  const std::string& backend, uint64_t seed);

}  // namespace mtrains
