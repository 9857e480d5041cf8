// What memory can do with nothing above it: host memory, or a file of a byte-addressable device mapped as a cache's is.
//
// Bandwidths are of all `threads` together, each in a share of its own; rows and latency are of one thread, at places drawn over the
// whole area: rows as independent copies, which overlap; latency along a chain of cache lines, of which each says where the next is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mtrains {

struct MemoryProbe {
  double read_bytes_per_s, write_bytes_per_s;
  std::vector<double> rows_per_s;  // one for each of row_bytes
  double latency_ns;
};

// folder: empty for host memory. Each part is measured for about `seconds`, after the area was touched. Raises kVolumeFull, kVolumeIo.
MemoryProbe probe_memory(const std::string& folder, uint64_t bytes, uint32_t threads, const std::vector<uint32_t>& row_bytes,
                         double seconds, uint64_t seed);

}  // namespace mtrains
