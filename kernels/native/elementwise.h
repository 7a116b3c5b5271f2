// What is done row by row between the products. The arithmetic is that of the references, in
// float32, rounded where they round; only sums over a row have an order of their own.
#pragma once

constexpr int64_t kRowsOfTask = 4;

template <class Row> static inline void for_rows(int threads, int64_t num_rows, const Row &row) {
  parallel(threads, (num_rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task) {
    for (int64_t t = task * kRowsOfTask; t < least((task + 1) * kRowsOfTask, num_rows); t++)
      row(t);
  });
}

static inline void put_bf16(bf16 *to, Vec x, int64_t n) { n >= 16 ? store_bf16(to, x) : store_bf16_some(to, x, int(n)); }

// q: the e4m3 bytes, scale: float32, perhaps unaligned; strides in bytes.
static void act_quant(int threads, const bf16 *x, int64_t num_rows, int64_t width, int64_t x_stride, int block,
                      uint8_t *q, int64_t q_stride, uint8_t *scale, int64_t scale_stride) {
  for_rows(threads, num_rows, [&](int64_t t) {
    for (int64_t begin = 0; begin < width; begin += block) {
      const int64_t n = least(block, width - begin);
      uint8_t *to = q + t * q_stride + begin;
      const float s = quantise_group(x + t * x_stride + begin, n, [&](int64_t k, Vec value, int count) {
        uint8_t some[16];
        store_bytes(some, encode_e4m3(value));
        memcpy(to + k, some, size_t(count));
      });
      memcpy(scale + t * scale_stride + begin / block * 4, &s, 4);
    }
  });
}

static inline void rmsnorm_row(const bf16 *x, const bf16 *weight, int64_t width, float eps, bf16 *y) {
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t k = 0; k < width; k += 16) {
    const Vec v = get_bf16(x + k, width - k);
    Vec &s = sum[k / 16 % 4];
    s = fma(v, v, s);
  }
  const float mean = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(width);
  const Vec root = set1(__builtin_sqrtf(mean + eps));
  for (int64_t k = 0; k < width; k += 16) {
    bf16 unit[16];
    store_bf16(unit, get_bf16(x + k, width - k) / root);
    put_bf16(y + k, load_bf16(unit) * get_bf16(weight + k, width - k), width - k);
  }
}

static void rmsnorm(int threads, const bf16 *x, const bf16 *weight, int64_t num_rows, int64_t width, int64_t x_stride,
                    float eps, bf16 *y, int64_t y_stride) {
  for_rows(threads, num_rows, [&](int64_t t) { rmsnorm_row(x + t * x_stride, weight, width, eps, y + t * y_stride); });
}

static inline float float_of(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline bf16 bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// y may be x.
static inline void rope_row(const bf16 *x, const float *cosine, const float *sine, int64_t pairs, bf16 *y) {
  for (int64_t i = 0; i < pairs; i++) {
    const float a = float_of(x[2 * i]), b = float_of(x[2 * i + 1]);
    y[2 * i] = bf16_of(a * cosine[i] - b * sine[i]);
    y[2 * i + 1] = bf16_of(b * cosine[i] + a * sine[i]);
  }
}

static void rope(int threads, const bf16 *x, int64_t num_rows, int64_t heads, int64_t pairs, int64_t x_row_stride,
                 int64_t x_head_stride, const float *cosine, const float *sine, bf16 *y, int64_t y_row_stride,
                 int64_t y_head_stride) {
  for_rows(threads, num_rows, [&](int64_t t) {
    for (int64_t h = 0; h < heads; h++)
      rope_row(x + t * x_row_stride + h * x_head_stride, cosine + t * pairs, sine + t * pairs, pairs,
               y + t * y_row_stride + h * y_head_stride);
  });
}

static void swiglu(int threads, const bf16 *h, int64_t num_rows, int64_t width, bf16 *y) {
  for_rows(threads, num_rows, [&](int64_t t) {
    const bf16 *gate = h + t * 2 * width, *up = gate + width;
    for (int64_t k = 0; k < width; k += 16) {
      const Vec g = get_bf16(gate + k, width - k);
      put_bf16(y + t * width + k, g * sigmoid(g) * get_bf16(up + k, width - k), width - k);
    }
  });
}

// home[t * top_k + k]: the row of `out` that is t's k-th; null: in order.
static void weighted_sum_of(int threads, const bf16 *out, const int64_t *home, const float *weight, const float *shared,
                            int64_t num_rows, int64_t top_k, int64_t width, void *y, int out_kind) {
  for_rows(threads, num_rows, [&](int64_t t) {
    for (int64_t d = 0; d < width; d += 16) {
      const int64_t n = width - d;
      Vec sum = zero();
      for (int64_t k = 0; k < top_k; k++) {
        const int64_t pair = t * top_k + k, from = home ? home[pair] : pair;
        const Vec one = get_bf16(out + from * width + d, n) * set1(weight[pair]);
        sum = k == 0 ? one : sum + one;
      }
      const float *s = shared + t * width + d;
      put_out(y, out_kind, t * width + d, sum + (n >= 16 ? load(s) : load_some(s, int(n))), int(least(16, n)));
    }
  });
}

static void weighted_sum(int threads, const bf16 *out, const float *weight, const float *shared, int64_t num_rows,
                         int64_t top_k, int64_t width, void *y, int out_kind) {
  weighted_sum_of(threads, out, nullptr, weight, shared, num_rows, top_k, width, y, out_kind);
}

static void latent_write(int threads, bf16 *cache, int64_t width, const int64_t *place, int64_t num_rows,
                         const bf16 *latent, int64_t latent_stride, int64_t latent_width, const bf16 *key,
                         int64_t key_stride) {
  for_rows(threads, num_rows, [&](int64_t t) {
    bf16 *to = cache + place[t] * width;
    memcpy(to, latent + t * latent_stride, size_t(latent_width) * 2);
    memcpy(to + latent_width, key + t * key_stride, size_t(width - latent_width) * 2);
  });
}
