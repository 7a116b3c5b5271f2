// A pool of threads that share the tasks of one call at a time; and memory that each thread keeps.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

// Run task(context, i) for i in [0, num_tasks) on up to `threads` threads, the caller's included.
// Which thread runs a task, and when, is not said: no result may depend on it. Calls from several threads at
// once are safe: while the pool works for one, others run their tasks by themselves.
void k2_parallel(int threads, int64_t num_tasks, void (*task)(void *context, int64_t i), void *context);

// At least `num_bytes` bytes of this thread's own, aligned to 64, kept until the thread ends; contents are
// left over from before. `which` tells apart the uses that one thread has at a time.
enum {
  K2_SCRATCH_LAYERS, // what whole layers keep between their halves
  K2_SCRATCH_WHOLE,  // what a whole half layer keeps between its steps
  K2_SCRATCH_PAIRS,
  K2_SCRATCH_ROWS,
  K2_SCRATCH_INNER_ROWS, // of two MLPs
  K2_SCRATCH_INNER_ROWS_2,
  K2_SCRATCH_INNER,
  K2_SCRATCH_PLACES,
  K2_SCRATCH_SUMS,
  K2_SCRATCH_WEIGHTS,
  K2_NUM_SCRATCH
};
void *k2_scratch(int which, size_t num_bytes);
}

// As k2_parallel, for a callable.
template <class Task> static inline void parallel(int threads, int64_t num_tasks, const Task &task) {
  k2_parallel(
      threads, num_tasks, [](void *context, int64_t i) { (*static_cast<const Task *>(context))(i); },
      const_cast<Task *>(&task));
}
