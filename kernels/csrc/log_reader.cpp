#include "log_reader.h"

#include <algorithm>
#include <chrono>
#include <iterator>

namespace mtrains {

uint64_t LogReader::submit(std::unique_ptr<ReadBatch> batch, const LogSegments& segments, std::function<void()> ready) {
  std::vector<IoJob> jobs = plan(*batch, segments);
  batch->left = jobs.size();
  if (!jobs.empty()) batch->ready = std::move(ready);
  uint64_t token;
  {
    std::lock_guard lock(mutex_);
    ios_ += jobs.size();
    for (const IoJob& job : jobs) bytes_ += job.bytes;
    token = ++last_batch_;
    batches_[token] = std::move(batch);
  }
  if (!jobs.empty()) queue_->submit(std::move(jobs));
  else if (ready) ready();
  return token;
}

std::vector<IoJob> LogReader::plan(ReadBatch& batch, const LogSegments& segments) {
  std::sort(batch.items.begin(), batch.items.end(), [](const auto& a, const auto& b) { return a.place < b.place; });
  constexpr uint64_t kInBlock = (uint64_t{1} << 15) - 1;
  std::vector<IoJob> jobs;
  for (uint32_t first = 0; first < batch.items.size();) {
    uint32_t end = first + 1;
    while (end < batch.items.size() && (batch.items[end].place | kInBlock) == (batch.items[first].place | kInBlock)) ++end;
    const Place from = Place::unpack(batch.items[first].place), to = Place::unpack(batch.items[end - 1].place);
    const BlockShape& shape = batch.tables[batch.items[first].request]->shape;
    const uint64_t begin = uint64_t{from.position} * shape.stride_bytes / kPageBytes * kPageBytes;
    const uint64_t stop = (uint64_t{to.position + 1} * shape.stride_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    const auto bytes = static_cast<uint32_t>(std::min<uint64_t>(stop, shape.block_bytes) - begin);
    const GetRequest& request = batch.requests[batch.items[first].request];
    const Part& part = request.parts.front();
    const IoJob::Ahead ahead = {static_cast<uint32_t>(uint64_t{from.position} * shape.stride_bytes - begin), shape.stride_bytes,
                                part.base + static_cast<uint64_t>(request.slots[batch.items[first].at]) * part.stride_bytes};
    jobs.push_back({false, segments.at(from.segment)->file.fd(), bytes, block_offset(shape.block_bytes, from.block) + begin, nullptr,
                    &batch, static_cast<uint32_t>(batch.reads.size()), ahead});
    batch.reads.push_back({first, end - first, static_cast<uint32_t>(begin)});
    first = end;
  }
  return jobs;
}

void LogReader::on_read(const IoJob& job, const std::byte* data, int error) {
  auto& batch = *static_cast<ReadBatch*>(job.owner);
  const ReadBatch::Read& read = batch.reads[job.index];
  for (uint32_t k = read.first_item; k < read.first_item + read.items; ++k) {
    const ReadBatch::Item& item = batch.items[k];
    const GetRequest& request = batch.requests[item.request];
    const LogTable& table = *batch.tables[item.request];
    const int64_t row = request.rows[item.at];
    const Place place = Place::unpack(item.place);
    if (error != 0) {
      batch.fail(ErrorKind::kVolumeIo, "cannot read " + table.describe(volume_, row, place) + ": " + IoQueue::text_of(error));
      continue;
    }
    const std::byte* record = data + uint64_t{place.position} * table.shape.stride_bytes - read.skipped_bytes;
    if (!table.sound(row, item.place, record)) {
      batch.fail(ErrorKind::kDamagedRecord, table.damage(volume_, row, place));
      continue;
    }
    scatter_record(record + kRecordHeaderBytes, request.parts, request.slots[item.at]);
  }
  if (error == 0) keep_wanted(batch, read, data, job.bytes);
  std::function<void()> ready;  // before the last read is counted: whoever waits takes the batch away then
  if (batch.left == 1) ready = std::move(batch.ready);
  if (batch.left.fetch_sub(1) == 1) {
    std::lock_guard lock(mutex_);
    done_.notify_all();
  }
  if (ready) ready();
}

void LogReader::keep_wanted(ReadBatch& batch, const ReadBatch::Read& read, const std::byte* data, uint32_t bytes) {
  const auto first = batch.items.begin() + read.first_item, last = first + read.items;
  const auto wants = std::find_if(first, last, [&](const ReadBatch::Item& item) { return batch.requests[item.request].wanted; });
  if (wants == last) return;
  const RowSet& wanted = *batch.requests[wants->request].wanted;
  const LogTable& table = *batch.tables[wants->request];
  const BlockShape& shape = table.shape;
  Place place = Place::unpack(first->place);
  const uint32_t end = std::min(shape.records, (read.skipped_bytes + bytes) / shape.stride_bytes);
  auto asked = first;
  for (place.position = (read.skipped_bytes + shape.stride_bytes - 1) / shape.stride_bytes; place.position < end; ++place.position) {
    const uint64_t packed = place.pack();
    while (asked != last && asked->place < packed) ++asked;
    if (asked != last && asked->place == packed) continue;
    const std::byte* record = data + uint64_t{place.position} * shape.stride_bytes - read.skipped_bytes;
    const int64_t row = header_of(record).row;
    if (!wanted.contains(row) || !table.sound(row, packed, record)) continue;
    Neighbours& found = batch.neighbours;
    found.rows.push_back({wants->request, shape.record_bytes, row, found.payloads.size()});
    found.payloads.insert(found.payloads.end(), record + kRecordHeaderBytes, record + kRecordHeaderBytes + shape.record_bytes);
    batch.neighbour_places.push_back(packed);
  }
}

std::unique_ptr<ReadBatch> LogReader::wait(uint64_t token) {
  std::unique_ptr<ReadBatch> batch;
  {
    std::unique_lock lock(mutex_);
    const auto at = batches_.find(token);
    if (at == batches_.end()) throw Error(ErrorKind::kVolume, "read " + std::to_string(token) + " was waited for already");
    const auto start = std::chrono::steady_clock::now();
    done_.wait(lock, [&] { return at->second->left == 0; });
    batch = std::move(at->second);
    batches_.erase(at);
    wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (!batch->error.empty()) throw Error(batch->error_kind, batch->error);
  return batch;
}

void LogReader::wait_for_all() {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return std::all_of(batches_.begin(), batches_.end(), [](const auto& b) { return b.second->left == 0; }); });
}

bool LogReader::idle() const {
  std::lock_guard lock(mutex_);
  return batches_.empty();
}

std::vector<std::shared_ptr<LogSegment>> LogReader::bury(std::span<const std::shared_ptr<LogSegment>> removed) {
  std::lock_guard lock(mutex_);
  const auto waited_for = [&](const Grave& g) { return !batches_.empty() && batches_.begin()->first <= g.last_batch; };
  const auto over = std::partition(graves_.begin(), graves_.end(), waited_for);
  std::vector<std::shared_ptr<LogSegment>> closed;
  for (auto g = over; g != graves_.end(); ++g) closed.push_back(std::move(g->segment));
  graves_.erase(over, graves_.end());
  for (const auto& s : removed) {
    if (!batches_.empty()) graves_.push_back({s, last_batch_});
  }
  return closed;
}

void LogReader::add_to(VolumeStats& stats) const {
  std::lock_guard lock(mutex_);
  stats.read_ios += ios_;
  stats.read_bytes += bytes_;
  stats.read_wait_seconds += wait_seconds_;
}

}  // namespace mtrains
