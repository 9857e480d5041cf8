// CRC-32C (Castagnoli, RFC 3720): the processor's instruction where it has one, a table elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mtrains {

// Extends `crc`, the checksum of what came before (0 for nothing), by n bytes.
uint32_t crc32c(uint32_t crc, const void* data, size_t n);

// The same on a processor without the instruction.
uint32_t crc32c_by_table(uint32_t crc, const void* data, size_t n);

}  // namespace mtrains
