// What the native tests are written in. No framework: a compiler and CMake are enough to run them.
//
//   TEST("a sentence") { ... }             registers a test; a failed check ends it, on whatever thread it is
//   CHECK(condition)   CHECK_EQ(got, want)
//   check_error(kind, what)                calls what and demands an Error of that kind; returns its message
//   Random random = fresh_random();        seeded from --seed and the test's name; the seed is printed when a test fails
//   rounds()                               --rounds: how many times longer than usual random histories are
//   Threads                                threads whose first failure is the test's
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"

namespace mtrains::test {

struct Test {
  std::string sentence;
  std::function<void()> body;
};
std::vector<Test>& tests();
struct Registered {
  Registered(std::string sentence, std::function<void()> body) { tests().push_back({std::move(sentence), std::move(body)}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

using Random = std::mt19937_64;
Random fresh_random();
uint32_t rounds();
inline uint64_t below(Random& random, uint64_t limit) { return random() % limit; }

template <class Got, class Want>
void check_eq(const Got& got, const Want& want, const char* text, const char* file, int line) {
  if (got == want) return;
  std::ostringstream message;
  message << text << ": got " << +got << ", want " << +want;
  fail(file, line, message.str());
}

template <class What>
std::string check_error_at(ErrorKind kind, What&& what, const char* file, int line) {
  try {
    what();
  } catch (const Error& e) {
    if (e.kind() != kind) fail(file, line, std::string("an error of another kind: ") + e.what());
    return e.what();
  }
  fail(file, line, "no error");
}

#define MTRAINS_JOIN_(a, b) a##b
#define MTRAINS_JOIN(a, b) MTRAINS_JOIN_(a, b)
#define TEST(sentence)                                                                                            \
  static void MTRAINS_JOIN(test_, __LINE__)();                                                                    \
  static const ::mtrains::test::Registered MTRAINS_JOIN(registered_, __LINE__)(sentence, MTRAINS_JOIN(test_, __LINE__)); \
  static void MTRAINS_JOIN(test_, __LINE__)()
#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) ::mtrains::test::fail(__FILE__, __LINE__, #condition); \
  } while (false)
#define CHECK_EQ(got, want) ::mtrains::test::check_eq((got), (want), #got " == " #want, __FILE__, __LINE__)
#define check_error(kind, ...) ::mtrains::test::check_error_at((kind), (__VA_ARGS__), __FILE__, __LINE__)

class Threads {
 public:
  ~Threads() {
    for (std::thread& t : threads_) {
      if (t.joinable()) t.join();
    }
  }
  void start(std::function<void()> body) {
    threads_.emplace_back([this, body = std::move(body)] {
      try {
        body();
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!first_) first_ = std::current_exception();
        failed_ = true;
      }
    });
  }
  bool failed() const { return failed_; }  // so that the others can stop
  void join() {
    for (std::thread& t : threads_) t.join();
    threads_.clear();
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::exception_ptr first_;
  std::atomic<bool> failed_{false};
};

}  // namespace mtrains::test
