// TaskQueue: work done in order on the one thread that all queues of the process share.
//
// Slot pools look up coming batches, evict and admit rows there while the training thread computes. One thread is enough: a batch's
// reads wait in the volume's I/O queue, not here. It starts with the first queue and lives as long as the process.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace mtrains {

class TaskQueue;

class TaskThread {
 public:
  static TaskThread& shared();

 private:
  friend class TaskQueue;
  TaskThread();
  void run();

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<std::pair<std::shared_ptr<TaskQueue>, std::function<void()>>> tasks_;
  const TaskQueue* running_ = nullptr;
};

class TaskQueue : public std::enable_shared_from_this<TaskQueue> {
 public:
  void post(std::function<void()> task);  // tasks do not throw; after close() nothing happens
  void drain();                           // until every task posted so far is done; not from a task
  void close();                           // drops what has not begun, and waits for what has

 private:
  TaskThread& thread_ = TaskThread::shared();
  size_t waiting_ = 0;  // under the thread's mutex, as is closed_
  bool closed_ = false;
  friend class TaskThread;
};

}  // namespace mtrains
