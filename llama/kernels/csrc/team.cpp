// Threads that take a loop's parts as they come.
//
// torch's parallel loop gives every thread its share beforehand, wakes all of them, and ends when the last one has:
// where another process holds a processor, each loop lasts until that thread was scheduled, and a layer has a dozen
// loops. Here the calling thread waits for nobody who has not begun. It takes parts like the others, and in the end
// waits for those that are being computed; a helper that comes late finds nothing to do. Helpers stay awake for a
// moment, since the next loop of a layer is near, and sleep while Python runs. There are as many threads as torch has.
//
// torch's own threads stay awake for longer than these, and would take the processors from them without having work.
// That is so behind a product of a matrix library, which is theirs; there they are the helpers. But a loop of theirs
// ends when the last one has: where others hold the processors they are often late, and loops are done without them.
#include "team.h"

#include <torch/csrc/stable/ops.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <mutex>
#include <thread>

namespace llama {
namespace {

// Each thread's parts, largest first, in eighths of its share: long runs of memory are read fastest, and the small ones
// in the end let threads finish together.
constexpr int64_t kSizes[] = {4, 2, 1, 1}, kRounds = 4, kEighths = 8;
constexpr int64_t kMostThreads = 0xffff / kRounds;  // the ticket has room for the parts of so many
constexpr int kLooks = 300;  // for something to do before a thread sleeps: some microseconds

// torch's threads are late in at most four of a hundred loops on a machine with little else to do, in thirty to fifty
// where two other processes compute. Once clearly more than every ninth is late, some loops are done without them.
constexpr auto kLate = std::chrono::microseconds(200);
constexpr int kLateWeighs = 8, kPatience = 40, kLoopsAlone = 500;

// Linux' own sleep, which may end early. gcc's std::atomic::wait first gives its time slice away, and on a busy machine
// that is a long time.
#ifdef __linux__
void sleep_while(std::atomic<int>& word, int value) {
  syscall(SYS_futex, (int*)&word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<int>& word) {
  syscall(SYS_futex, (int*)&word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
void sleep_while(std::atomic<int>& word, int value) { word.wait(value); }
void wake_all(std::atomic<int>& word) { word.notify_all(); }
#endif

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Where part `number` of a loop of `count` begins, which so many threads share.
int64_t border(int64_t number, int64_t count, int64_t threads) {
  int64_t eighths = 0;
  for (const int64_t size : kSizes) {
    const int64_t some = std::min(number, threads);
    eighths += some * size, number -= some;
  }
  return count * eighths / (kEighths * threads);
}

struct Team {
  std::mutex in_use;  // by the thread whose loop it is
  int num_helpers = 0;
  std::atomic<int> num_wanted{0};  // helpers beyond that many leave a loop alone
  std::atomic<int> num_loops{0};   // what sleeping helpers watch
  std::atomic<int> num_asleep{0};  // of them
  std::atomic<int> num_done{0};    // parts of this loop
  std::atomic<bool> is_waited_for{false};  // by the thread whose loop it is, asleep
  std::atomic<bool> is_torch_awake{false};
  int lateness = 0, loops_alone = 0;  // of torch's threads, lately; loops still to do without them

  // Which loop, of how many parts, and which part is next: 32, 16 and 16 bits. Whoever raises it has that part. What
  // the loop is stands beside it: a thread reads that first, and it is of the same loop if the ticket still was.
  std::atomic<uint64_t> ticket{0};
  std::atomic<Part> part{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int64_t> count{0};
  std::atomic<int64_t> threads{0};

  // False where no part is left.
  bool take_part() {
    uint64_t now = ticket.load(std::memory_order_acquire);
    const int64_t parts = now >> 16 & 0xffff, next = now & 0xffff;
    if (next >= parts) return false;
    const Part f = part.load(std::memory_order_relaxed);
    void* with = context.load(std::memory_order_relaxed);
    const int64_t all = count.load(std::memory_order_relaxed);
    const int64_t among = threads.load(std::memory_order_relaxed);
    if (!ticket.compare_exchange_strong(now, now + 1, std::memory_order_acq_rel)) return true;
    f(border(next, all, among), border(next + 1, all, among), with);
    if (num_done.fetch_add(1) + 1 == parts && is_waited_for.load()) wake_all(num_done);
    return true;
  }

  void help(int number) {
    for (;;) {
      const int seen = num_loops.load(std::memory_order_acquire);
      for (int looks = 0; looks < kLooks && num_loops.load(std::memory_order_relaxed) == seen; ++looks) {
        while (number < num_wanted.load(std::memory_order_relaxed) && take_part()) looks = 0;
        pause();
      }
      num_asleep.fetch_add(1);
      sleep_while(num_loops, seen);
      num_asleep.fetch_sub(1);
    }
  }

  void take_parts() {
    while (take_part()) {
    }
  }

  void take_parts_with_torch(int threads) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point done;  // with what this thread has taken
    torch::stable::parallel_for(0, threads, 1, [&](int64_t number, int64_t) {
      take_parts();
      if (number == 0) done = Clock::now();
    });
    lateness = std::max(0, lateness + (Clock::now() - done > kLate ? kLateWeighs : -1));
    if (lateness > kPatience) lateness = 0, loops_alone = kLoopsAlone;
  }

  void run(int64_t parts, int helpers) {
    const bool by_torch = is_torch_awake.load(std::memory_order_relaxed) && loops_alone == 0;
    loops_alone = std::max(0, loops_alone - 1);
    num_wanted.store(by_torch ? 0 : helpers, std::memory_order_relaxed);
    num_done.store(0, std::memory_order_relaxed);
    const uint64_t loop = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(loop << 32 | (uint64_t)parts << 16, std::memory_order_release);
    if (by_torch) {
      take_parts_with_torch(helpers + 1);
    } else {
      for (; num_helpers < helpers; ++num_helpers) std::thread(&Team::help, this, num_helpers).detach();
      num_loops.fetch_add(1);
      if (num_asleep.load()) wake_all(num_loops);
      take_parts();
    }
    int looks = 0;
    for (int done; (done = num_done.load(std::memory_order_acquire)) < parts;) {
      if (++looks < kLooks) {
        pause();
      } else {
        is_waited_for.store(true);
        sleep_while(num_done, done);
      }
    }
    is_waited_for.store(false, std::memory_order_relaxed);
  }
};

// Never destroyed: helpers sleep in it until the process ends.
Team& team() {
  static Team& one = *new Team;
  return one;
}

}  // namespace

void share(int64_t count, int64_t grain, Part part, void* context) {
  const int64_t threads = count > grain ? std::min<int64_t>(torch::stable::get_num_threads(), kMostThreads) : 1;
  std::unique_lock<std::mutex> lock(team().in_use, std::defer_lock);
  if (threads < 2 || !lock.try_lock()) {  // others have a loop of their own: two at a time would be no faster
    if (count > 0) part(0, count, context);
    return;
  }
  Team& t = team();
  t.part.store(part, std::memory_order_relaxed);
  t.context.store(context, std::memory_order_relaxed);
  t.count.store(count, std::memory_order_relaxed);
  t.threads.store(threads, std::memory_order_relaxed);
  t.run(kRounds * threads, (int)threads - 1);
}

void torch_multiplied(bool torch) { team().is_torch_awake.store(torch, std::memory_order_relaxed); }

}  // namespace llama
