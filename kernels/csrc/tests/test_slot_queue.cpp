#include "slot_queue.h"

#include <list>
#include <vector>

#include "check.h"

namespace mtrains::test {
namespace {

constexpr int32_t kSlots = 300;

void check_same(const SlotQueue& queue, const std::list<int32_t>& expected) {
  CHECK_EQ(queue.size(), expected.size());
  auto at = expected.begin();
  queue.each([&](int32_t slot, bool in_place) {
    CHECK(in_place);
    CHECK_EQ(slot, *at++);
  });
}

}  // namespace

TEST("two queues of one set of slots keep their orders, whoever leaves from between") {
  Random random = fresh_random();
  std::vector<uint32_t> places(kSlots);
  SlotQueue queues[2] = {SlotQueue(places.data()), SlotQueue(places.data())};
  std::list<int32_t> expected[2];
  std::vector<int> queue_of(kSlots, -1);
  for (uint32_t i = 0; i < 20'000 * rounds(); ++i) {
    const auto slot = static_cast<int32_t>(below(random, kSlots));
    const int q = queue_of[slot];
    if (q < 0) {
      const int to = static_cast<int>(below(random, 2));
      queue_of[slot] = to;
      if (below(random, 4) == 0) {
        queues[to].push_oldest(slot);
        expected[to].push_front(slot);
      } else {
        queues[to].push_newest(slot);
        expected[to].push_back(slot);
      }
    } else if (below(random, 3) == 0) {
      const int32_t oldest = queues[q].pop_oldest();
      CHECK_EQ(oldest, expected[q].front());
      expected[q].pop_front();
      queue_of[oldest] = -1;
    } else {
      queues[q].remove(slot);
      expected[q].remove(slot);
      queue_of[slot] = -1;
    }
    if (i % 64 == 0 || i < 500) {
      for (const int k : {0, 1}) check_same(queues[k], expected[k]);
    }
  }
}

TEST("the holes of slots that left from between are never more than a quarter of those that stay and a few") {
  std::vector<uint32_t> places(10'000);
  SlotQueue queue(places.data());
  for (int32_t slot = 0; slot < 10'000; ++slot) queue.push_newest(slot);
  for (int32_t slot = 1; slot < 10'000; ++slot) {
    queue.remove(slot);
    CHECK(queue.holes() <= queue.size() / 4 + 64);
  }
  CHECK_EQ(queue.size(), size_t{1});
  CHECK_EQ(queue.pop_oldest(), 0);
}

}  // namespace mtrains::test
