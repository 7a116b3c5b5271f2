// Workers wait for a job by spinning for a while and then in the kernel; the caller works too. A job is open
// while it has tasks to give: a worker that wakes late finds it closed and is not waited for, so a thread that
// the operating system holds back costs nothing but its help.
#include "pool.h"

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <ctime>
#include <linux/futex.h>
#include <mutex>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kSpinNs = 200'000; // between two calls of a decode step lie 5 to 50 us of Python
constexpr int kMaxWorkers = 256;

// The pool's word: epoch of the job (32 bits) | number of workers at work on it (31 bits) | whether it is open.
constexpr uint64_t kOpen = 1, kWorker = 2, kEpoch = uint64_t(1) << 32;
std::atomic<uint64_t> word{0};
std::atomic<uint32_t> bell{0}; // counts jobs, for the futex
std::atomic<int> num_asleep{0};
std::atomic<bool> is_busy{false};
std::atomic<int> num_wanted{0}; // workers with a lower number may join the job

struct Job {
  void (*task)(void *, int64_t);
  void *context;
  int64_t num_tasks;
  std::atomic<int64_t> next;
} job;

int num_workers = 0; // changed only by who holds is_busy
std::once_flag fork_handler;

void relax() { __builtin_ia32_pause(); }

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t(1'000'000'000) + t.tv_nsec;
}

void take_tasks() {
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.num_tasks;)
    job.task(job.context, i);
}

// True if this worker now counts among those at work on the open job of a new epoch.
bool join(int number, uint32_t &seen_epoch) {
  uint64_t now = word.load(std::memory_order_acquire);
  while ((now & kOpen) && uint32_t(now >> 32) != seen_epoch) {
    if (number >= num_wanted.load(std::memory_order_relaxed))
      return false;
    if (word.compare_exchange_weak(now, now + kWorker, std::memory_order_acq_rel)) {
      seen_epoch = uint32_t(now >> 32);
      return true;
    }
  }
  return false;
}

void *work(void *argument) {
  const int number = int(reinterpret_cast<intptr_t>(argument));
  uint32_t seen_epoch = 0;
  for (;;) {
    const uint32_t ring = bell.load(std::memory_order_acquire);
    if (join(number, seen_epoch)) {
      take_tasks();
      word.fetch_sub(kWorker, std::memory_order_acq_rel);
      continue;
    }
    const int64_t give_up_ns = now_ns() + kSpinNs;
    bool has_rung = false;
    while (!(has_rung = bell.load(std::memory_order_acquire) != ring) && now_ns() < give_up_ns)
      for (int i = 0; i < 16; i++)
        relax();
    if (has_rung)
      continue;
    num_asleep.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, ring, nullptr, nullptr, 0);
    num_asleep.fetch_sub(1, std::memory_order_seq_cst);
  }
}

// A child process has none of its parent's threads.
void forget_workers() {
  num_workers = 0;
  word.store(0);
  num_asleep.store(0);
  is_busy.store(false);
}

void hire(int wanted) {
  std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, forget_workers); });
  while (num_workers < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, work, reinterpret_cast<void *>(intptr_t(num_workers))) != 0)
      return; // fewer hands, the same results
    pthread_detach(thread);
    num_workers++;
  }
}

struct Scratch {
  void *memory[K2_NUM_SCRATCH] = {};
  size_t num_bytes[K2_NUM_SCRATCH] = {};
  ~Scratch() {
    for (void *m : memory)
      free(m);
  }
};
thread_local Scratch scratch;

} // namespace

void k2_parallel(int threads, int64_t num_tasks, void (*task)(void *, int64_t), void *context) {
  int wanted = int(threads - 1 < num_tasks - 1 ? threads - 1 : num_tasks - 1);
  if (wanted > kMaxWorkers)
    wanted = kMaxWorkers;
  if (wanted <= 0 || is_busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < num_tasks; i++)
      task(context, i);
    return;
  }
  hire(wanted);
  job.task = task;
  job.context = context;
  job.num_tasks = num_tasks;
  job.next.store(0, std::memory_order_relaxed);
  num_wanted.store(wanted, std::memory_order_relaxed);
  const uint64_t epoch = word.load(std::memory_order_relaxed) & ~(kEpoch - 1);
  word.store((epoch + kEpoch) | kOpen, std::memory_order_release);
  bell.fetch_add(1, std::memory_order_seq_cst);
  if (num_asleep.load(std::memory_order_seq_cst) > 0)
    syscall(SYS_futex, &bell, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  take_tasks();
  word.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int i = 0; word.load(std::memory_order_acquire) & (kEpoch - 1); i++) {
    relax();
    if (i > 20'000) // about a millisecond: a worker was held back in the middle of a task
      sched_yield();
  }
  is_busy.store(false, std::memory_order_release);
}

void *k2_scratch(int which, size_t num_bytes) {
  if (scratch.num_bytes[which] < num_bytes) {
    free(scratch.memory[which]);
    const size_t rounded = (num_bytes + 4095) & ~size_t(4095);
    scratch.memory[which] = aligned_alloc(4096, rounded);
    if (scratch.memory[which] == nullptr)
      abort(); // as torch does where memory ends
    scratch.num_bytes[which] = rounded;
  }
  return scratch.memory[which];
}
