// LogVolume: puts and gets: rows come into open blocks, blocks go to the writer, and the index follows.
#include <algorithm>
#include <cstring>

#include "errors.h"
#include "log_volume.h"

namespace mtrains {
namespace {

constexpr uint32_t kEntriesAhead = 16;  // of the index, prefetched: each row is a miss of the processor's caches

}  // namespace

// -- putting

void LogVolume::put(TableId id, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts) {
  Lock lock(mutex_);
  require_usable();
  require_writable();
  LogTable& table = tables_.at(id);
  require_rows(table.spec, rows);
  const size_t piece = size_t{capacity_blocks(table.shape.block_bytes)} * table.shape.records;
  for (size_t first = 0; first < rows.size(); first += piece) {
    const size_t count = std::min(piece, rows.size() - first);
    put_piece(table, rows.subspan(first, count), slots.subspan(first, count), parts, lock);
  }
}

void LogVolume::put_piece(LogTable& table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts,
                          Lock& lock) {
  uint64_t blocks;
  do {
    drained_.wait(lock, [&] { return checkpointing_ == 0; });
    require_usable();
    blocks = ensure_room(table, rows.size(), lock);  // may wait, and a checkpoint begin meanwhile
  } while (checkpointing_ > 0);
  table.fresh.stream->promised_blocks += blocks;
  const auto end = [blocks](LogStream* stream) { stream->promised_blocks -= blocks; };
  const std::unique_ptr<LogStream, decltype(end)> under_way(table.fresh.stream, end);
  for (size_t i = 0; i < rows.size(); ++i) {
    gather_record(parts, slots[i], append(table, table.fresh, rows[i], next_sequence_++, lock));
  }
  stats_.put_rows += rows.size();
  step_put_bytes_ += rows.size() * uint64_t{table.shape.share_bytes()};
}

uint64_t& LogVolume::entry_to_change(LogTable& table, int64_t row) {
  uint64_t& entry = table.index[static_cast<size_t>(row)];
  if (snapshot_) {  // what it has still to write is kept for it
    const size_t t = table.id - 1;
    const auto r = static_cast<uint64_t>(row);
    if (t < snapshot_->before.size() && (t > snapshot_->table || (t == snapshot_->table && r >= snapshot_->row))) {
      snapshot_->before[t].emplace(r, entry);
    }
  }
  return entry;
}

void LogVolume::give_up(LogTable& table, int64_t row, uint64_t place) {
  if (table.index[static_cast<size_t>(row)] != place) return;  // it has been put since
  lose(table, place);
  entry_to_change(table, row) = LogTable::kGivenUp;
  given_up_bytes_ += table.shape.stride_bytes;
}

std::byte* LogVolume::append(LogTable& table, OpenBlock& open, int64_t row, uint64_t sequence, Lock& lock) {
  const RecordHeader header{0, table.id, row, sequence};
  for (;;) {  // seal may wait, and other threads put or grow the table meanwhile
    const uint64_t entry = table.index[static_cast<size_t>(row)];
    if (entry != LogTable::kGivenUp && (entry & LogTable::kOpen)) {
      std::byte* record = table.open_record(entry);
      std::memcpy(record, &header, sizeof header);
      return record + kRecordHeaderBytes;
    }
    if (open.rows.size() < table.shape.records) break;
    seal(table, open, lock);
  }
  uint64_t& entry = entry_to_change(table, row);
  if (entry && &open == &table.fresh) replaced_bytes_ += table.shape.stride_bytes;
  if (entry == LogTable::kGivenUp) {
    given_up_bytes_ -= table.shape.stride_bytes;
  } else if (entry) {
    lose(table, entry);
  }
  entry = open.flag | open.rows.size();
  std::byte* record = table.open_record(entry);
  std::memcpy(record, &header, sizeof header);
  const size_t used = kRecordHeaderBytes + table.spec.record_bytes;
  std::memset(record + used, 0, table.shape.stride_bytes - used);
  open.rows.push_back(row);
  return record + kRecordHeaderBytes;
}

void LogVolume::seal(LogTable& table, OpenBlock& open, Lock& lock) {
  if (open.rows.empty()) return;
  LogStream& stream = *open.stream;
  writer_.wait_for_buffer(stream, lock);
  if (open.rows.empty()) return;  // another thread sealed it while this one waited
  const auto [segment, block, to] = writer_.next_block(stream);
  for (uint32_t i = 0; i < open.rows.size(); ++i) {
    std::byte* record = open.bytes.get() + uint64_t{i} * table.shape.stride_bytes;
    const uint64_t place = Place{segment.number, block, i}.pack();
    const uint32_t crc = record_crc(record, table.spec.record_bytes, place);
    std::memcpy(record, &crc, sizeof crc);
    table.index[static_cast<size_t>(open.rows[i])] = place;
  }
  if (segment.live_bytes == 0 && segment.kept > 0) --coming_;
  const size_t used = open.rows.size() * table.shape.stride_bytes;
  segment.records += static_cast<uint32_t>(open.rows.size());
  segment.live_bytes += open.rows.size() * uint64_t{table.shape.share_bytes()};
  live_bytes_ += open.rows.size() * uint64_t{table.shape.share_bytes()};
  std::memcpy(to, open.bytes.get(), used);
  std::memset(to + used, 0, stream.block_bytes - used);
  open.rows.clear();
  writer_.end_block(stream);
}

void LogVolume::drain(Lock& lock) {
  for (LogTable& t : tables_) {
    seal(t, t.fresh, lock);
    seal(t, t.moved, lock);
  }
  writer_.dispatch();
  writer_.wait_for_writes(lock);
  require_usable();
}

// What a checkpoint commits must be on disk at one moment: puts that begin wait, those that have begun end.
void LogVolume::drain_alone(Lock& lock) {
  ++checkpointing_;
  const auto over = [this](void*) {
    --checkpointing_;
    drained_.notify_all();
  };
  const std::unique_ptr<void, decltype(over)> guard(this, over);
  const auto is_open = [](const LogTable& t) { return !t.fresh.rows.empty() || !t.moved.rows.empty(); };
  do {
    drain(lock);
  } while (std::any_of(tables_.begin(), tables_.end(), is_open) || !writer_.idle());
}

void LogVolume::flush() {
  Lock lock(mutex_);
  require_usable();
  require_writable();
  drain(lock);
}

// -- getting

uint64_t LogVolume::submit_get(std::vector<GetRequest> requests, std::function<void()> ready) {
  Lock lock(mutex_);
  require_loaded();
  for (const GetRequest& r : requests) require_rows(tables_.at(r.table).spec, r.rows);
  auto batch = std::make_unique<ReadBatch>();
  batch->requests = std::move(requests);
  std::vector<std::byte> initial;
  std::vector<ReadBatch::Item> taken;
  for (uint32_t r = 0; r < batch->requests.size(); ++r) {
    const GetRequest& request = batch->requests[r];
    LogTable& table = tables_[request.table];
    batch->tables.push_back(&table);
    stats_.get_rows += request.rows.size();
    for (uint32_t i = 0; i < request.rows.size(); ++i) {
      if (i + kEntriesAhead < request.rows.size()) {
        __builtin_prefetch(&table.index[static_cast<size_t>(request.rows[i + kEntriesAhead])]);
      }
      const uint64_t entry = table.index[static_cast<size_t>(request.rows[i])];
      const std::byte* record = nullptr;
      if (entry == 0) {
        initial.resize(table.spec.record_bytes);
        table.init.fill(request.rows[i], initial.data(), table.spec.record_bytes);
        scatter_record(initial.data(), request.parts, request.slots[i]);
        ++stats_.get_rows_initial;
        continue;
      }
      if (entry == LogTable::kGivenUp) {
        throw Error(ErrorKind::kVolume, "volume " + name_ + ", table '" + table.spec.name + "', row " +
                                            std::to_string(request.rows[i]) + ": its newest value is in a slot pool that was not "
                                            "flushed. Read it there, or flush or close the pool first");
      }
      if (entry & LogTable::kOpen) {
        record = table.open_record(entry);
      } else {
        const Place place = Place::unpack(entry);
        const LogSegment& segment = *segments_.at(place.segment);
        if (const std::byte* block = LogWriter::in_memory(segment, place.block)) {
          record = block + uint64_t{place.position} * table.shape.stride_bytes;
          if (options_.mapped && !table.sound(request.rows[i], entry, record)) {
            batch->fail(ErrorKind::kDamagedRecord, table.damage(name_, request.rows[i], place));
            continue;
          }
        }
      }
      if (record) {
        scatter_record(record + kRecordHeaderBytes, request.parts, request.slots[i]);
        if (options_.mapped && request.take && !(entry & LogTable::kOpen)) taken.push_back({entry, r, i});
        ++(options_.mapped ? stats_.get_rows_mapped : stats_.get_rows_buffered);
      } else {
        batch->items.push_back({entry, r, i});
      }
    }
  }
  if (batch->error.empty()) {  // as in wait(): a batch that fails gives up nothing
    for (const ReadBatch::Item& item : taken) give_up(*batch->tables[item.request], batch->requests[item.request].rows[item.at], item.place);
  }
  if (batch->items.empty() && batch->error.empty()) return 0;
  return reader_.submit(std::move(batch), segments_, std::move(ready));
}

Neighbours LogVolume::wait(uint64_t token) {
  if (token == 0) return {};
  const std::unique_ptr<ReadBatch> batch = reader_.wait(token);
  finish(*batch);
  return std::move(batch->neighbours);
}

// Gives up what was taken, and leaves out neighbours that are no longer newest.
void LogVolume::finish(ReadBatch& batch) {
  std::vector<Neighbour>& found = batch.neighbours.rows;
  if (found.empty() && std::none_of(batch.requests.begin(), batch.requests.end(), [](const GetRequest& r) { return r.take; })) return;
  Lock lock(mutex_);
  if (closed_ || !writer_.error().empty()) {
    found.clear();
    return;
  }
  for (size_t k = 0; k < batch.items.size(); ++k) {
    if (k + kEntriesAhead < batch.items.size()) {
      const ReadBatch::Item& ahead = batch.items[k + kEntriesAhead];
      __builtin_prefetch(&batch.tables[ahead.request]->index[static_cast<size_t>(batch.requests[ahead.request].rows[ahead.at])], 1);
    }
    const ReadBatch::Item& item = batch.items[k];
    const GetRequest& request = batch.requests[item.request];
    if (request.take) give_up(*batch.tables[item.request], request.rows[item.at], item.place);
  }
  size_t kept = 0;
  for (size_t k = 0; k < found.size(); ++k) {
    const LazyArray<uint64_t>& index = batch.tables[found[k].request]->index;
    if (index[static_cast<size_t>(found[k].row)] == batch.neighbour_places[k]) found[kept++] = found[k];
  }
  found.resize(kept);
  stats_.neighbour_rows += kept;
}

}  // namespace mtrains
