#include "log_table.h"

namespace mtrains {

bool LogTable::sound(int64_t row, uint64_t place, const std::byte* record) const {
  const RecordHeader h = header_of(record);
  return h.table == id && h.row == row && h.crc == record_crc(record, spec.record_bytes, place);
}

std::string LogTable::describe(const std::string& volume, int64_t row, Place place) const {
  return "volume " + volume + ", segment " + std::to_string(place.segment) + ", block " + std::to_string(place.block) + ", record " +
         std::to_string(place.position) + ", table '" + spec.name + "', row " + std::to_string(row);
}

std::string LogTable::damage(const std::string& volume, int64_t row, Place place) const {
  return "damaged: " + describe(volume, row, place) + " fails its checksum. Resume from a checkpoint on a sound device, or restore the "
         "volume from a copy";
}

}  // namespace mtrains
