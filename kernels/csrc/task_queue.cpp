#include "task_queue.h"

#include <algorithm>
#include <thread>

#include "thread_name.h"

namespace mtrains {

TaskThread& TaskThread::shared() {
  static auto* const thread = new TaskThread;
  return *thread;
}

TaskThread::TaskThread() {
  std::thread([this] { run(); }).detach();
}

void TaskThread::run() {
  name_thread("mtrains-pool");
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !tasks_.empty(); });
    auto [queue, task] = std::move(tasks_.front());
    tasks_.pop_front();
    running_ = queue.get();
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
    --queue->waiting_;
    running_ = nullptr;
    done_.notify_all();
  }
}

void TaskQueue::post(std::function<void()> task) {
  {
    std::lock_guard lock(thread_.mutex_);
    if (closed_) return;
    ++waiting_;
    thread_.tasks_.emplace_back(shared_from_this(), std::move(task));
  }
  thread_.wake_.notify_one();
}

void TaskQueue::drain() {
  std::unique_lock lock(thread_.mutex_);
  thread_.done_.wait(lock, [&] { return waiting_ == 0; });
}

void TaskQueue::close() {
  std::unique_lock lock(thread_.mutex_);
  closed_ = true;
  waiting_ -= std::erase_if(thread_.tasks_, [&](const auto& task) { return task.first.get() == this; });
  thread_.done_.wait(lock, [&] { return thread_.running_ != this; });
}

}  // namespace mtrains
