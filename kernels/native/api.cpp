// The library's door: which ISAs this machine can run, each one's functions, and the packing of weights.
#include "abi.h"
#include "pack.h"
#include "pool.h"

#include <atomic>
#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace k2_avx2 {
extern const K2Ops ops;
}
namespace k2_avx512 {
extern const K2Ops ops;
}
namespace k2_avx512_bf16 {
extern const K2Ops ops;
}
namespace k2_amx {
extern const K2Ops ops;
}

namespace {

constexpr long kAskForState = 0x1023, kTileData = 18; // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)

bool has_amx() {
#if defined(K2_WITH_AMX)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 24)) || !(d & (1u << 22)))
    return false;
  // Linux gives a process the tiles only if it asks, once for all its threads.
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

} // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// What gave these bits: the sources' checksum and the compiler.
EXPORT const char *k2_build() { return K2_SOURCES " " __VERSION__; }

// Checksum of the Python file that this was built to be called by.
EXPORT const char *k2_caller() { return K2_CALLER; }

// Bit i: whether this machine runs ISA i.
EXPORT int k2_isas() {
  __builtin_cpu_init();
  int isas = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    isas |= 1 << K2_AVX2;
  if (isas && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    isas |= 1 << K2_AVX512;
  if ((isas & 1 << K2_AVX512) && __builtin_cpu_supports("avx512bf16"))
    isas |= 1 << K2_AVX512_BF16;
  if ((isas & 1 << K2_AVX512_BF16) && has_amx())
    isas |= 1 << K2_AMX;
  return isas;
}

EXPORT const K2Ops *k2_ops(int isa) {
  switch (isa) {
#if defined(K2_WITH_AVX2)
  case K2_AVX2:
    return &k2_avx2::ops;
#endif
#if defined(K2_WITH_AVX512)
  case K2_AVX512:
    return &k2_avx512::ops;
#endif
#if defined(K2_WITH_AVX512_BF16)
  case K2_AVX512_BF16:
    return &k2_avx512_bf16::ops;
#endif
#if defined(K2_WITH_AMX)
  case K2_AMX:
    return &k2_amx::ops;
#endif
  default:
    return nullptr;
  }
}

// Large pages for memory that will be read from end to end, where the kernel gives them on request.
EXPORT void k2_advise(void *memory, int64_t num_bytes) {
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (uintptr_t(memory) + page - 1) & ~(page - 1), end = (uintptr_t(memory) + num_bytes) & ~(page - 1);
  if (end > begin)
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE); // a wish: refusal costs only speed
}

// Fill `out` and `out_scale` as K2Packed says, all slots in one go; or, if `compares`, only say whether they hold
// that already: 1 if they differ. Panel p gets rows [row[p], row[p] + width[p]) of matrix part[p] of its slot; a
// matrix has elements of one (fp8) or two bytes, element (n, k) at n * row_stride + k * col_stride. `scale`: of each
// matrix, [blocks of rows][blocks of inputs]; null: no scales. Blocks have at most 128 inputs.
EXPORT int k2_pack(int threads, int compares, int kind, int num_slots, int num_parts, const uint8_t *const *matrix,
                   const float *const *scale, int64_t num_inputs, int64_t row_stride, int64_t col_stride, int block,
                   int num_panels, const int32_t *part, const int32_t *row, const int32_t *width, int64_t panel_bytes,
                   uint8_t *out, float *out_scale) {
  const int64_t size = kind == K2_FP8 ? 1 : 2, num_blocks = (num_inputs + block - 1) / block;
  std::atomic<int> differs{0};
  parallel(threads, int64_t(num_slots) * num_panels, [&](int64_t i) {
    const int64_t slot = i / num_panels, p = i % num_panels, which = slot * num_parts + part[p];
    const int64_t group = p / kPanels * kPanels, panels = num_panels - group < kPanels ? num_panels - group : kPanels;
    const uint8_t *rows = matrix[which] + row[p] * row_stride * size;
    uint8_t *to = out + (slot * num_panels + group) * panel_bytes;
    alignas(64) uint8_t wanted[128 * 16 * 2];
    for (int64_t begin = 0; begin < num_inputs; begin += block) {
      const int64_t end = begin + block < num_inputs ? begin + block : num_inputs;
      const int64_t block_bytes = (end - begin + 31) / 32 * 32 * 16 * size;
      uint8_t *place = to + (p - group) * block_bytes;
      pack_block(kind, rows, row_stride, col_stride, begin, end, width[p], block_bytes, compares ? wanted : place);
      if (compares && memcmp(place, wanted, size_t(block_bytes)) != 0)
        differs = 1;
      to += panels * block_bytes;
    }
    if (!scale)
      return;
    float *place = out_scale + i * num_blocks;
    const float *from = scale[which] + row[p] / block * num_blocks;
    const size_t bytes = size_t(num_blocks) * sizeof(float);
    if (!compares)
      memcpy(place, from, bytes);
    else if (memcmp(place, from, bytes) != 0)
      differs = 1;
  });
  return differs;
}
}
