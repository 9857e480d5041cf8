// LogInspector: a look into the log of one committed checkpoint from its files alone, without the volume's lock and without
// changing anything.
//
// For every row: the highest sequence read so far, and the segment that holds it. Segments are read in any order of calls;
// as in replay, of two records with one sequence (a survivor and its copy) the one read later counts. Both arrays are
// mapped lazily: 12 bytes a row that occurs in the log.
//
// Damage is listed, not thrown: a block without a record of a known table, a header that names an impossible row, with
// `verify` also a record that fails its checksum and bytes behind the last record of a block. A block's other records are
// still read. No more than kMostDamage are described; all are counted.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "lazy_array.h"
#include "manifest.h"

namespace mtrains {

struct Damage {
  uint32_t segment, block, position;
  std::string table;  // empty when it is unknown
  int64_t row;
  std::string what;
};

class LogInspector {
 public:
  static constexpr size_t kMostDamage = 1000;

  explicit LogInspector(Manifest manifest);
  LogInspector(const LogInspector&) = delete;
  // Blocks from `first` on. Throws kVolumeIo, and kDamagedRecord for a file that is not the segment or ends early.
  void read(const ManifestSegment& segment, uint32_t first, const std::string& file, bool verify);

  uint64_t damage_count() const { return damage_count_; }
  const std::vector<Damage>& damage() const { return damage_; }
  uint64_t records(uint32_t segment) const { return records_.at(segment); }
  std::map<uint32_t, uint64_t> newest_by_segment() const;
  std::vector<uint64_t> live_rows() const;  // by table

 private:
  void read_block(const ManifestSegment& segment, uint32_t block, const std::byte* data, bool verify);
  void add(const ManifestSegment& segment, uint32_t block, uint32_t position, const std::string& table, int64_t row, std::string what);

  const Manifest manifest_;
  std::vector<LazyArray<uint64_t>> sequences_;  // by table; sequences begin at 1
  std::vector<LazyArray<uint32_t>> segments_;   // by table: where the row's newest record is
  std::map<uint32_t, uint64_t> records_;
  std::vector<Damage> damage_;
  uint64_t damage_count_ = 0;
};

}  // namespace mtrains
