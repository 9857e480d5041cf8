// LogInspector: a look into the log of one committed checkpoint from its files alone, without the volume's lock and without
// changing anything.
//
// For every row: the highest sequence read so far, and the segment that holds it. Segments are read in any order of calls;
// as in replay, of two records with one sequence (a survivor and its copy) the one read later counts. Both arrays are
// mapped lazily: 12 bytes a row that occurs in the log.
//
// An index snapshot says for every row where its newest record was then. Each entry stays open until its record is met. Rows with a
// record behind what the snapshot covers are settled by that, as in replay: where their old record was may be cleaned away. 8 bytes
// a row more.
//
// Damage is listed, not thrown: a block without a record of a known table, a header that names an impossible row, with
// `verify` also a record that fails its checksum and bytes behind the last record of a block. A block's other records are
// still read. No more than kMostDamage are described; all are counted.
#pragma once

#include <cstdint>
#include <map>
#include <set>
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
  // The index snapshot that the manifest names, before any segment. Throws kVolumeIo, and kDamagedRecord for one that opening refuses.
  void read_snapshot(const std::string& file);
  // Blocks from `first` on, in which the checkpoint counts `records`. Throws kVolumeIo, and kDamagedRecord for a file that is not the
  // segment or ends early.
  void read(const ManifestSegment& segment, uint32_t first, uint32_t records, const std::string& file, bool verify);
  void check_snapshot();  // after the last segment: what of the snapshot is still open is damage

  uint64_t damage_count() const { return damage_count_; }
  const std::vector<Damage>& damage() const { return damage_; }
  uint64_t records(uint32_t segment) const { return records_.at(segment); }
  std::map<uint32_t, uint64_t> newest_by_segment() const;
  std::vector<uint64_t> live_rows() const;  // by table

 private:
  void read_block(const ManifestSegment& segment, uint32_t block, const std::byte* data, bool verify);
  void settle(TableId table, const RecordHeader& header, uint64_t newest_before, Place place, bool covered);
  void add(uint32_t segment, uint32_t block, uint32_t position, const std::string& table, int64_t row, std::string what);

  const Manifest manifest_;
  std::vector<LazyArray<uint64_t>> sequences_;  // by table; sequences begin at 1
  std::vector<LazyArray<uint32_t>> segments_;   // by table: where the row's newest record is
  std::vector<LazyArray<uint64_t>> entries_;    // by table, of the snapshot: a place, or what became of it; none without one
  std::map<uint32_t, uint32_t> in_snapshot_;    // by segment: blocks that it covers
  std::set<uint32_t> unread_;                   // segments whose end was not reached
  std::map<uint32_t, uint64_t> records_;
  std::vector<Damage> damage_;
  uint64_t damage_count_ = 0;
};

}  // namespace mtrains
