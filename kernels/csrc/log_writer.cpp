#include "log_writer.h"

#include <algorithm>
#include <utility>

#include "errors.h"

namespace mtrains {
namespace {

constexpr uint64_t kChunkBytes = 256u << 10;  // one write
constexpr size_t kMostChunks = 8;             // of a stream, in memory: full, being written or being filled

}  // namespace

uint64_t LogStream::room_blocks() const {
  uint64_t room = current ? current->capacity_blocks - current->blocks : 0;
  for (const auto& s : ready) room += s->capacity_blocks;
  return room;
}

LogStream& LogWriter::stream(uint32_t block_bytes, bool survivors) {
  for (LogStream& s : streams_) {
    if (s.block_bytes == block_bytes && s.survivors == survivors) return s;
  }
  LogStream& s = streams_.emplace_back();
  s.block_bytes = block_bytes;
  s.survivors = survivors;
  s.chunk_blocks = static_cast<uint32_t>(std::max<uint64_t>(kChunkBytes / block_bytes, 1));
  return s;
}

std::set<uint32_t> LogWriter::filling() const {
  std::set<uint32_t> numbers;
  for (const LogStream& s : streams_) {
    if (s.current) numbers.insert(s.current->number);
    for (const auto& r : s.ready) numbers.insert(r->number);
  }
  return numbers;
}

void LogWriter::next_segment(LogStream& stream) {
  if (stream.current && stream.current->blocks < stream.current->capacity_blocks) return;
  if (stream.ready.empty()) stream.ready.push_back(make_segment_(stream.block_bytes));
  stream.current = stream.ready.front();
  stream.ready.pop_front();
}

void LogWriter::wait_for_buffer(LogStream& stream, Lock& lock) {
  if (!queue_ || stream.chunk) return;
  if (stream.spare.empty() && stream.chunks.size() < kMostChunks) {
    stream.chunks.push_back(std::make_unique<LogChunk>());
    stream.chunks.back()->stream = &stream;
    stream.chunks.back()->buffer = aligned_bytes(uint64_t{stream.chunk_blocks} * stream.block_bytes);
    stream.spare.push_back(stream.chunks.back().get());
  }
  written_.wait(lock, [&] { return stream.chunk || !stream.spare.empty() || !error_.empty() || closed_; });
  require_open(closed_, volume_);
  if (stream.chunk) return;  // another thread's, which has room: whoever fills the last block sends it off
  if (stream.spare.empty()) require_sound();
}

void LogWriter::begin_chunk(LogStream& stream) {
  LogChunk* chunk = stream.chunk = stream.spare.back();
  stream.spare.pop_back();
  chunk->segment = stream.current.get();
  chunk->first_block = stream.current->blocks;
  chunk->blocks = 0;
  chunk->segment->chunks.push_back(chunk);
}

LogWriter::Block LogWriter::next_block(LogStream& stream) {
  if (!stream.chunk) {
    next_segment(stream);
    if (queue_) begin_chunk(stream);
  }
  LogSegment& segment = *stream.current;
  const uint32_t number = segment.blocks++;
  segment.unsynced = true;
  std::byte* bytes = stream.chunk ? stream.chunk->buffer.get() + uint64_t{stream.chunk->blocks++} * stream.block_bytes
                                  : segment.mapping.data() + block_offset(stream.block_bytes, number);
  return {segment, number, bytes};
}

void LogWriter::end_block(LogStream& stream) {
  if (!queue_) {
    ++ios_;
    bytes_ += stream.block_bytes;
  } else if (stream.chunk->blocks == stream.chunk_blocks || stream.current->blocks == stream.current->capacity_blocks) {
    dispatch(stream);
  }
}

void LogWriter::dispatch() {
  for (LogStream& s : streams_) dispatch(s);
}

void LogWriter::dispatch(LogStream& stream) {
  LogChunk* chunk = std::exchange(stream.chunk, nullptr);
  if (!chunk) return;
  ++writing_;
  const uint32_t bytes = chunk->blocks * stream.block_bytes;
  ++ios_;
  bytes_ += bytes;
  queue_->submit({{true, chunk->segment->file.fd(), bytes, block_offset(stream.block_bytes, chunk->first_block), chunk->buffer.get(), chunk, 0}});
}

void LogWriter::on_written(LogChunk& chunk, int error) {
  std::lock_guard lock(mutex_);
  --writing_;
  if (error != 0) {  // the chunk stays: its records are served from it
    fail("a write of " + folders_[chunk.segment->path].segment_file(chunk.segment->number) + " at block " +
         std::to_string(chunk.first_block) + " failed (" + IoQueue::text_of(error) + ")");
  } else {
    std::erase(chunk.segment->chunks, &chunk);
    chunk.stream->spare.push_back(&chunk);
  }
  written_.notify_all();
}

void LogWriter::wait_for_writes(Lock& lock) {
  written_.wait(lock, [&] { return writing_ == 0; });
}

bool LogWriter::idle() const {
  return writing_ == 0 && std::none_of(streams_.begin(), streams_.end(), [](const LogStream& s) { return s.chunk != nullptr; });
}

const std::byte* LogWriter::in_memory(const LogSegment& segment, uint32_t block) {
  if (segment.mapping.data()) return segment.mapping.data() + block_offset(segment.block_bytes, block);
  for (const LogChunk* c : segment.chunks) {
    if (block >= c->first_block && block < c->first_block + c->blocks) {
      return c->buffer.get() + uint64_t{block - c->first_block} * segment.block_bytes;
    }
  }
  return nullptr;
}

void LogWriter::fail(std::string what) {
  if (error_.empty()) error_ = std::move(what);
}

void LogWriter::require_sound() const {
  if (!error_.empty()) {
    throw Error(ErrorKind::kVolumeIo, "volume " + volume_ + ": " + error_ + ". Everything up to the last checkpoint is intact; "
                                          "resume from it once the device works");
  }
}

void LogWriter::reset() {
  for (LogStream& s : streams_) {
    s.current.reset();
    s.ready.clear();
    s.chunk = nullptr;
    s.spare.clear();
    for (const auto& c : s.chunks) s.spare.push_back(c.get());
  }
}

void LogWriter::add_to(VolumeStats& stats) const {
  stats.write_ios += ios_;
  stats.write_bytes += bytes_;
}

}  // namespace mtrains
