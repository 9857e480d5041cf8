// What a device can do with nothing above it: random aligned reads through an engine, kept at one depth.
#pragma once

#include <cstdint>
#include <string>

namespace mtrains {

struct ProbeResult {
  uint64_t reads;
  double seconds;
  double cpu_seconds;  // of the calling thread
};

// Reads `file` (opened with O_DIRECT where the file system has it) for about `seconds`, `block_bytes` at random multiples of
// it. backend as in IoQueue.
ProbeResult random_reads(const std::string& file, uint32_t block_bytes, uint32_t depth, double seconds, const std::string& backend,
                         uint64_t seed);

}  // namespace mtrains
