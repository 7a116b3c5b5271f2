// Activations laid out for `multiply`: quantised on the way where the weights say so.
#pragma once

static inline void put_act(bf16 *to, Vec x, int n) {
  if (n == 16)
    store_bf16(to, x);
  else
    store_bf16_some(to, x, n);
}
static inline void put_act(float *to, Vec x, int n) {
  if (n == 16)
    store(to, x);
  else
    store_some(to, x, n);
}

static inline Vec get_bf16(const bf16 *p, int64_t n) { return n >= 16 ? load_bf16(p) : load_bf16_some(p, int(n)); }

// max(|x|, 1e-4) / 448 of n values, the values' grid points handed to `put(i, vec, n)`.
template <class Put> static inline float quantise_group(const bf16 *x, int64_t n, const Put &put) {
  Ints largest = iset(0); // as integers, NaN is larger than all
  for (int64_t i = 0; i < n; i += 16)
    largest = imax(largest, bits_of(abs_of(get_bf16(x + i, n - i))));
  int32_t all[16];
  memcpy(all, &largest, 64);
  int32_t top = all[0];
  for (int i = 1; i < 16; i++)
    top = all[i] > top ? all[i] : top;
  float amax;
  memcpy(&amax, &top, 4);
  const float scale = (amax < 1e-4f ? 1e-4f : amax) / 448.0f;
  const Vec by = set1(scale), limit = set1(448.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Vec q = max2(zero() - limit, min2(limit, get_bf16(x + i, n - i) / by)); // NaN stays
    put(i, round_e4m3(q), int(least(16, n - i)));
  }
  return scale;
}

// Pieces of one scratch: `take` them twice in the same order, first to see how much memory they want.
struct Pieces {
  uint8_t *memory = nullptr;
  size_t used = 0;
  template <class T> T *take(int64_t count) {
    T *piece = (T *)(memory + used);
    used += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return piece;
  }
};

template <class Take> static inline void take_pieces(int which, const Take &take) {
  Pieces pieces;
  take(pieces);
  pieces.memory = (uint8_t *)k2_scratch(which, pieces.used);
  pieces.used = 0;
  take(pieces);
}

static inline K2Rows bf16_rows(const bf16 *x, int64_t num_rows, int64_t stride) {
  return {K2_ROWS_BF16, num_rows, stride * 2, (const uint8_t *)x, 0, nullptr, nullptr};
}

// Row `to` of `laid` from row `i` of `rows`, as weights `w` take it.
static void lay_row(const K2Packed *w, const K2Rows *rows, int64_t i, const Laid &laid, int64_t to) {
  const int64_t number = rows->index ? rows->index[i] : i;
  const uint8_t *data = rows->data + number * rows->stride_bytes;
  for (int b = 0; b < w->num_blocks; b++) {
    const int64_t begin = int64_t(b) * w->block, n = least(w->block, w->num_inputs - begin);
    const int depth = depth_of(w, b);
    Act *a = laid.a + laid.rows * laid.stride * b + to * depth;
    float *sx = laid.sx + b * laid.rows + to;
    if (n < depth)
      memset(a, 0, size_t(depth) * sizeof(Act));
    if (rows->kind == K2_ROWS_E4M3) {
      memcpy(sx, rows->scale + number * rows->scale_stride_bytes + 4 * b, 4);
      for (int64_t k = 0; k < n; k += 16) {
        uint8_t some[16] = {};
        const int count = int(least(16, n - k));
        memcpy(some, data + begin + k, size_t(count));
        put_act(a + k, decode_e4m3(load_bytes(some)), count);
      }
    } else if (w->are_acts_quantised) {
      *sx = quantise_group((const bf16 *)data + begin, n, [&](int64_t k, Vec q, int count) { put_act(a + k, q, count); });
    } else {
      *sx = 1.0f;
      for (int64_t k = 0; k < n; k += 16)
        put_act(a + k, get_bf16((const bf16 *)data + begin + k, n - k), int(least(16, n - k)));
    }
  }
}

constexpr int64_t kLayRows = 4; // of one task

// Room for rows as `w` takes them, in the calling thread's scratch `which`.
static Laid laid_out(const K2Packed *w, int64_t num_rows, int which) {
  Laid laid;
  laid.rows = num_rows;
  laid.stride = round_up(w->block, 32);
  const size_t act_bytes = size_t(round_up(int64_t(sizeof(Act)) * laid.rows * laid.stride * w->num_blocks, 64));
  uint8_t *memory = (uint8_t *)k2_scratch(which, act_bytes + 4 * size_t(laid.rows) * size_t(w->num_blocks));
  laid.a = (Act *)memory;
  laid.sx = (float *)(memory + act_bytes);
  return laid;
}

// All of `rows`.
static Laid lay(int threads, const K2Packed *w, const K2Rows *rows, int which) {
  const Laid laid = laid_out(w, rows->num_rows, which);
  parallel(threads, (laid.rows + kLayRows - 1) / kLayRows, [&](int64_t task) {
    for (int64_t i = task * kLayRows; i < least((task + 1) * kLayRows, laid.rows); i++)
      lay_row(w, rows, i, laid, i);
  });
  return laid;
}

// Rows of `one`, laid out anew in the order of `index`; `w`: whose rows they are.
static Laid lay_again(int threads, const K2Packed *w, const Laid &one, const int64_t *index, int64_t num_rows, int which) {
  Laid laid = laid_out(w, num_rows, which);
  parallel(threads, (num_rows + kLayRows - 1) / kLayRows, [&](int64_t task) {
    for (int b = 0; b < w->num_blocks; b++) {
      const int64_t depth = depth_of(w, b);
      for (int64_t i = task * kLayRows; i < least((task + 1) * kLayRows, num_rows); i++) {
        memcpy(laid.a + laid.rows * laid.stride * b + i * depth, one.a + one.rows * one.stride * b + index[i] * depth,
               size_t(depth) * sizeof(Act));
        laid.sx[b * laid.rows + i] = one.sx[b * one.rows + index[i]];
      }
    }
  });
  return laid;
}
