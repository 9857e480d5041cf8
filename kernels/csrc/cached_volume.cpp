#include "cached_volume.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "errors.h"

namespace mtrains {

namespace {
constexpr size_t kAhead = 32;  // rows between the prefetch of a directory entry and its use; guess
}

TableId CachedVolume::table(const TableSpec& spec, const Initializer& init, std::span<const CacheSpec> caches) {
  std::lock_guard lock(mutex_);
  require_open(closed_, id());
  const TableId below = below_.table(spec, init);
  for (size_t t = 0; t < tables_.size(); ++t) {
    if (tables_[t].below != below) continue;
    if (caches.empty()) return static_cast<TableId>(t);
    throw Error(ErrorKind::kConfiguration, "table '" + spec.name + "' is already open; its caches were chosen then");
  }
  Table table{spec, below, {}};
  table.caches.reserve(caches.size());
  for (const CacheSpec& c : caches) table.caches.emplace_back(c, spec, batch_limit_);
  tables_.push_back(std::move(table));
  return static_cast<TableId>(tables_.size() - 1);
}

CachedVolume::Table& CachedVolume::at(TableId table) {
  require_open(closed_, id());
  return tables_.at(table);
}

void CachedVolume::put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts) {
  std::lock_guard lock(mutex_);
  Table& t = at(table);
  ++came_down_;
  below_.put(t.below, rows, slots, parts);
  for (RecordCache& cache : t.caches) {
    for (const int64_t row : rows) cache.drop_row(row);
  }
}

void CachedVolume::evict(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts,
                         bool dirty) {
  std::lock_guard lock(mutex_);
  Table& t = at(table);
  require_rows(t.spec, rows);
  if (dirty) {  // as many at a time as the first cache has room for: none of them sinks before its older copies are dropped
    const size_t most = t.caches.empty() ? rows.size() : t.caches[0].rows();
    for (size_t first = 0; first < rows.size(); first += most) {
      const auto some = rows.subspan(first, std::min(most, rows.size() - first));
      insert(t, 0, some, slots.subspan(first, some.size()), parts, true);
      for (size_t c = 1; c < t.caches.size(); ++c) {
        for (const int64_t row : some) t.caches[c].drop_row(row);
      }
    }
    return;
  }
  std::vector<int64_t> new_rows;
  std::vector<int32_t> new_slots;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto has = [&](const RecordCache& cache) { return cache.slot_of_row(rows[i]) >= 0; };
    if (const auto cache = std::find_if(t.caches.begin(), t.caches.end(), has); cache != t.caches.end()) {
      cache->keep(cache->slot_of_row(rows[i]));
    } else {
      new_rows.push_back(rows[i]);
      new_slots.push_back(slots[i]);
    }
  }
  insert(t, 0, new_rows, new_slots, parts, false);
}

void CachedVolume::insert(Table& table, size_t level, std::span<const int64_t> rows, std::span<const int32_t> slots,
                          std::span<const Part> parts, bool dirty) {
  if (level == table.caches.size()) {
    ++came_down_;
    below_.evict(table.below, rows, slots, parts, dirty);
    return;
  }
  table.caches[level].insert(rows, slots, parts, dirty,
                             [&](auto rows, auto slots, auto parts, bool dirty) { insert(table, level + 1, rows, slots, parts, dirty); });
}

void CachedVolume::read_cached(Table& table, GetRequest& request, std::vector<Taken>& taken) {
  for (RecordCache& cache : table.caches) {
    size_t left = 0;
    const size_t asked = request.rows.size();
    for (size_t i = 0; i < asked; ++i) {
      if (i + kAhead < asked) cache.prefetch(request.rows[i + kAhead]);
      const int32_t slot = cache.slot_of_row(request.rows[i]);
      if (slot < 0) {
        request.rows[left] = request.rows[i];
        request.slots[left++] = request.slots[i];
        continue;
      }
      scatter_record(cache.record(slot), request.parts, request.slots[i]);
      if (request.take) taken.push_back({&cache, slot, cache.insertion(slot)});
    }
    request.rows.resize(left);
    request.slots.resize(left);
    cache.count_reads(static_cast<int64_t>(asked - left), static_cast<int64_t>(left));
  }
}

uint64_t CachedVolume::submit_get(std::vector<GetRequest> requests, std::function<void()> ready) {
  Pending pending{0, {}, {}};
  {
    std::lock_guard lock(mutex_);
    for (const GetRequest& r : requests) require_rows(at(r.table).spec, r.rows);
    for (GetRequest& r : requests) {
      Table& t = at(r.table);
      read_cached(t, r, pending.taken);
      pending.tables.push_back(r.table);
      r.table = t.below;
    }
  }
  const bool all_here = std::all_of(requests.begin(), requests.end(), [](const GetRequest& r) { return r.rows.empty(); });
  if (!all_here) pending.below_token = below_.submit_get(std::move(requests), std::move(ready));
  std::lock_guard lock(mutex_);
  if (pending.below_token == 0) {
    release(pending.taken);
    return 0;
  }
  pending_.emplace(++last_token_, std::move(pending));
  return last_token_;
}

Neighbours CachedVolume::wait(uint64_t token) {
  if (token == 0) return {};
  Pending pending;
  uint64_t came_down;
  {
    std::lock_guard lock(mutex_);
    pending = std::move(pending_.extract(token).mapped());
    came_down = came_down_;
  }
  Neighbours neighbours = below_.wait(pending.below_token);
  std::lock_guard lock(mutex_);
  std::erase_if(neighbours.rows, [&](const Neighbour& n) {
    if (closed_ || came_down_ != came_down) return true;
    const std::vector<RecordCache>& caches = tables_[pending.tables[n.request]].caches;
    return std::any_of(caches.begin(), caches.end(), [&](const RecordCache& cache) { return cache.slot_of_row(n.row) >= 0; });
  });
  release(pending.taken);
  return neighbours;
}

// What came into a slot since then stays.
void CachedVolume::release(const std::vector<Taken>& taken) {
  if (closed_) return;
  for (const Taken& t : taken) {
    if (t.cache->holds(t.slot, t.insertion)) t.cache->drop(t.slot);
  }
}

void CachedVolume::flush() {
  std::lock_guard lock(mutex_);
  require_open(closed_, id());
  ++came_down_;
  for (Table& t : tables_) {
    for (RecordCache& cache : t.caches) {
      cache.flush([&](auto rows, auto slots, auto parts, bool) { below_.put(t.below, rows, slots, parts); });
    }
  }
  below_.flush();
}

void CachedVolume::checkpoint(uint64_t epoch) {
  flush();
  below_.checkpoint(epoch);
}

void CachedVolume::restore(uint64_t epoch) {
  below_.restore(epoch);
  forget();
}

void CachedVolume::close() {
  std::lock_guard lock(mutex_);
  tables_.clear();
  closed_ = true;
}

void CachedVolume::forget() {
  std::lock_guard lock(mutex_);
  for (Table& t : tables_) {
    for (RecordCache& cache : t.caches) cache.forget();
  }
}

std::vector<CacheStats> CachedVolume::cache_stats(TableId table) const {
  std::lock_guard lock(mutex_);
  std::vector<CacheStats> stats;
  for (const RecordCache& cache : tables_.at(table).caches) stats.push_back(cache.stats());
  return stats;
}

void CachedVolume::check() const {
  std::lock_guard lock(mutex_);
  for (const Table& t : tables_) {
    for (const RecordCache& cache : t.caches) cache.check();
    for (int64_t row = 0; row < t.spec.row_count; ++row) {
      const std::byte* first = nullptr;
      for (const RecordCache& cache : t.caches) {
        const int32_t slot = cache.slot_of_row(row);
        if (slot < 0) continue;
        if (first && std::memcmp(first, cache.record(slot), t.spec.record_bytes)) throw std::logic_error("cached volume: two caches differ");
        first = cache.record(slot);
      }
    }
  }
}

}  // namespace mtrains
