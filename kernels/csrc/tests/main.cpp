// Runs the native tests: native_tests [--list] [--seed N] [--rounds N] [part of a sentence].
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "check.h"

namespace mtrains::test {
namespace {

uint64_t seed = 1;
uint32_t round_count = 1;
std::string running;

}  // namespace

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

Random fresh_random() {
  std::vector<uint32_t> words{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (const char c : running) words.push_back(static_cast<uint8_t>(c));
  std::seed_seq mixed(words.begin(), words.end());
  return Random(mixed);
}

uint32_t rounds() { return round_count; }

static int run(const std::string& part) {
  size_t passed = 0, failed = 0, skipped = 0;
  for (const Test& test : tests()) {
    if (test.sentence.find(part) == std::string::npos) continue;
    running = test.sentence;
    const auto begin = std::chrono::steady_clock::now();
    const char* word = "ok";
    std::string why;
    try {
      test.body();
      ++passed;
    } catch (const Skipped& e) {
      ++skipped;
      word = "skipped";
      why = e.what();
    } catch (const std::exception& e) {
      ++failed;
      word = "FAILED";
      why = e.what();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%-7s %6.2f s  %s%s%s\n", word, seconds, running.c_str(), why.empty() ? "" : "\n        ", why.c_str());
    std::fflush(stdout);
  }
  std::printf("native tests: %zu passed, %zu failed, %zu skipped (--seed %llu --rounds %u)\n", passed, failed, skipped,
              static_cast<unsigned long long>(seed), round_count);
  return failed > 0 || passed == 0;
}

}  // namespace mtrains::test

int main(int argc, char** argv) {
  using namespace mtrains::test;
  std::string part;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--list") {
      for (const Test& t : tests()) std::puts(t.sentence.c_str());
      return 0;
    }
    if ((word == "--seed" || word == "--rounds") && i + 1 < argc) {
      const uint64_t number = std::strtoull(argv[++i], nullptr, 10);
      if (word == "--seed") seed = number;
      else round_count = static_cast<uint32_t>(number);
    } else if (word.starts_with("--")) {
      std::fprintf(stderr, "usage: %s [--list] [--seed N] [--rounds N] [part of a sentence]\n", argv[0]);
      return 2;
    } else {
      part = word;
    }
  }
  return run(part);
}
