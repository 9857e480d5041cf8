// CachedVolume: a volume whose tables have record caches in front of a volume below, their home. Any number of tables, each
// with any number of caches, the fastest first; a table without any is passed through, so that a batch of gets over all of
// them reaches the home as one batch.
//
// A row's life: it is read from the first cache that has it, or from its home. A reader that takes it (GetRequest::take)
// becomes its keeper: the caches let go of it when wait() has returned. When the reader evicts it, it enters the first cache;
// from there it sinks, cache by cache, as others come; a dirty one is put into the home when it leaves the last cache.
//
// What always holds, besides what volume.h promises:
//   - a row is in at most one cache of its table (in two, with one value, after an eviction that failed half-way), and what
//     is there is not older than what the home has;
//   - a dirty record leaves a cache only when the next tier has it, or a taker's get has succeeded;
//   - a put goes to the home, and the row leaves the caches: its caller keeps a copy above them;
//   - when a read fails, everything taken with it is still in the caches;
//   - a neighbour that the home gives is handed on unless a cache has the row, or any row came down to the home during the
//     wait: the home's value may have been an older one.
#pragma once

#include <deque>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "record_cache.h"
#include "volume.h"

namespace mtrains {

class CachedVolume final : public Volume {
 public:
  CachedVolume(Volume& below, uint32_t batch_limit) : below_(below), batch_limit_(batch_limit) {}

  TableId table(const TableSpec& spec, const Initializer& init) override { return table(spec, init, {}); }
  TableId table(const TableSpec& spec, const Initializer& init, std::span<const CacheSpec> caches);

  void put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots,
           std::span<const Part> parts) override;
  void evict(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts,
             bool dirty) override;
  uint64_t submit_get(std::vector<GetRequest> requests, std::function<void()> ready) override;
  Neighbours wait(uint64_t token) override;
  void flush() override;
  void checkpoint(uint64_t epoch) override;
  std::vector<uint64_t> epochs() const override { return below_.epochs(); }
  void restore(uint64_t epoch) override;
  VolumeStats stats() const override { return below_.stats(); }
  const char* backend() const override { return below_.backend(); }
  std::string id() const override { return below_.id(); }
  void close() override;  // the caches; the volume below is its owner's to close

  void forget();  // every cache is emptied, unwritten
  std::vector<CacheStats> cache_stats(TableId table) const;
  void check() const;  // tests: throws std::logic_error at a broken invariant

 private:
  struct Table {
    TableSpec spec;
    TableId below;
    std::vector<RecordCache> caches;
  };
  struct Taken {
    RecordCache* cache;
    int32_t slot;
    uint64_t insertion;
  };
  struct Pending {
    uint64_t below_token;
    std::vector<Taken> taken;
    std::vector<TableId> tables;  // by request
  };

  Table& at(TableId table);
  void read_cached(Table& table, GetRequest& request, std::vector<Taken>& taken);
  void insert(Table& table, size_t level, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts,
              bool dirty);
  void release(const std::vector<Taken>& taken);

  Volume& below_;
  const uint32_t batch_limit_;
  std::deque<Table> tables_;
  std::map<uint64_t, Pending> pending_;
  uint64_t last_token_ = 0;
  uint64_t came_down_ = 0;  // times that rows went to the home
  bool closed_ = false;
  mutable std::mutex mutex_;
};

}  // namespace mtrains
