#include "volume.h"

#include <cstring>

#include "errors.h"

namespace mtrains {

void require_open(bool closed, const std::string& volume) {
  if (closed) throw Error(ErrorKind::kVolume, "volume " + volume + " is closed; open it again");
}

bool is_valid(const TableSpec& spec) {
  return !spec.name.empty() && spec.name.size() <= 1024 && spec.row_count >= 1 && spec.row_count <= (int64_t{1} << 40) &&
         spec.record_bytes >= 1 && spec.record_bytes <= (1u << 20);
}

void require_valid(const TableSpec& spec) {
  if (!is_valid(spec)) {
    throw Error(ErrorKind::kConfiguration,
                "table '" + spec.name + "': a table has a name of 1 to 1024 bytes, 1 to 2^40 rows and records of 1 byte to "
                "1 MiB, got " + std::to_string(spec.row_count) + " rows of " + std::to_string(spec.record_bytes) + " bytes");
  }
}

void require_same_shape(const TableSpec& have, const TableSpec& asked, const std::string& volume) {
  if (have.row_count == asked.row_count && have.record_bytes == asked.record_bytes) return;
  throw Error(ErrorKind::kVolumeMismatch,
              "volume " + volume + " holds table '" + asked.name + "' with " + std::to_string(have.row_count) + " rows of " +
                  std::to_string(have.record_bytes) + " bytes, asked for were " + std::to_string(asked.row_count) + " of " +
                  std::to_string(asked.record_bytes) + ". Nothing was changed. Use the model, optimizer and sharding that "
                  "wrote it, or name another path");
}

void require_rows(const TableSpec& spec, std::span<const int64_t> rows) {
  for (const int64_t row : rows) {
    if (row < 0 || row >= spec.row_count) {
      throw Error(ErrorKind::kIdOutOfRange, "row " + std::to_string(row) + " of table '" + spec.name + "' is outside [0, " +
                                                std::to_string(spec.row_count) + "). Nothing was changed");
    }
  }
}

void require_newer(std::span<const uint64_t> epochs, uint64_t epoch, const std::string& volume) {
  if (epochs.empty() || epoch > epochs.back()) return;
  throw Error(ErrorKind::kVolume, "volume " + volume + ": a checkpoint's epoch must be above the last one (" +
                                      std::to_string(epochs.back()) + "), got " + std::to_string(epoch));
}

void gather_record(std::span<const Part> parts, int32_t slot, std::byte* record) {
  for (const Part& p : parts) {
    std::memcpy(record, p.base + static_cast<uint64_t>(slot) * p.stride_bytes, p.bytes);
    record += p.bytes;
  }
}

void scatter_record(const std::byte* record, std::span<const Part> parts, int32_t slot) {
  for (const Part& p : parts) {
    std::memcpy(p.base + static_cast<uint64_t>(slot) * p.stride_bytes, record, p.bytes);
    record += p.bytes;
  }
}

}  // namespace mtrains
