// What is done row by row between the products, and the router. The arithmetic is that of the references, in
// float32, rounded where they round; only sums over a row have an order of their own.
#pragma once

constexpr int64_t kRowsOfTask = 16;

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

static void weighted_sum(int threads, const bf16 *out, const float *weight, const float *shared, int64_t num_rows,
                         int64_t top_k, int64_t width, void *y, int out_kind) {
  for_rows(threads, num_rows, [&](int64_t t) {
    for (int64_t d = 0; d < width; d += 16) {
      const int64_t n = width - d;
      Vec sum = zero();
      for (int64_t k = 0; k < top_k; k++) {
        const Vec one = get_bf16(out + (t * top_k + k) * width + d, n) * set1(weight[t * top_k + k]);
        sum = k == 0 ? one : sum + one;
      }
      const float *s = shared + t * width + d;
      put_out(y, out_kind, t * width + d, sum + (n >= 16 ? load(s) : load_some(s, int(n))), int(least(16, n)));
    }
  });
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

// y[t, h] = x[t, h] w[h]^T: a slot of `w` per head.
static void heads(int threads, const K2Packed *w, const bf16 *x, int64_t num_rows, int64_t num_heads,
                  int64_t x_row_stride, int64_t x_head_stride, bf16 *y) {
  const int64_t groups = (w->num_panels + kPanels - 1) / kPanels;
  const int64_t chunks = (num_rows + kChunkRows - 1) / kChunkRows;
  parallel(threads, num_heads * chunks, [&](int64_t task) {
    const int64_t h = task % num_heads, first = task / num_heads * kChunkRows;
    const int64_t rows_here = least(kChunkRows, num_rows - first);
    const K2Rows rows = {K2_ROWS_BF16, rows_here, x_row_stride * 2,
                         (const uint8_t *)(x + first * x_row_stride + h * x_head_stride), 0, nullptr, nullptr};
    const Laid laid = lay(1, w, &rows, K2_SCRATCH_ROWS);
    for (int64_t group = 0; group < groups; group++)
      linear_task(w, h, int(group), laid, 0, rows_here, y + (first * num_heads + h) * w->num_outputs, K2_OUT_BF16,
                  num_heads * w->num_outputs);
  });
}

// -- the router ----------------------------------------------------------------------------------------------

// Dot products of R rows with E experts; each has one order, whatever R and E.
template <int R, int E>
static inline void dots(const float *x, const float *w, int64_t width, float *y, int64_t y_stride) {
  Vec sum[R][E];
  for (int r = 0; r < R; r++)
    for (int e = 0; e < E; e++)
      sum[r][e] = zero();
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t n = width - k;
    Vec weight[E];
    for (int e = 0; e < E; e++)
      weight[e] = n >= 16 ? load(w + e * width + k) : load_some(w + e * width + k, int(n));
    for (int r = 0; r < R; r++) {
      const Vec v = n >= 16 ? load(x + r * width + k) : load_some(x + r * width + k, int(n));
      for (int e = 0; e < E; e++)
        sum[r][e] = fma(v, weight[e], sum[r][e]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int e = 0; e < E; e++)
      y[r * y_stride + e] = sum_lanes(sum[r][e]);
}

constexpr int kExperts = 4; // of one tile

// Float32 weights: half precision here flips experts.
static void router_logits(int threads, const bf16 *x, int64_t num_rows, int64_t width, int64_t x_stride,
                          const float *w, int64_t num_experts, float *y) {
  float *wide = (float *)k2_scratch(K2_SCRATCH_ROWS, size_t(num_rows * width) * 4);
  for_rows(threads, num_rows, [&](int64_t t) {
    for (int64_t k = 0; k < width; k += 16) {
      const Vec v = get_bf16(x + t * x_stride + k, width - k);
      width - k >= 16 ? store(wide + t * width + k, v) : store_some(wide + t * width + k, v, int(width - k));
    }
  });
  const int64_t row_tasks = (num_rows + 63) / 64, expert_tasks = (num_experts + 15) / 16;
  parallel(threads, row_tasks * expert_tasks, [&](int64_t task) {
    const int64_t row_end = least((task / expert_tasks + 1) * 64, num_rows);
    const int64_t expert_end = least((task % expert_tasks + 1) * 16, num_experts);
    for (int64_t e = task % expert_tasks * 16; e < expert_end;) {
      const bool is_tile = e + kExperts <= expert_end;
      for (int64_t t = task / expert_tasks * 64; t < row_end;) {
        const float *from = wide + t * width, *weight = w + e * width;
        float *to = y + t * num_experts + e;
        const bool are_four = t + 4 <= row_end;
        if (is_tile)
          are_four ? dots<4, kExperts>(from, weight, width, to, num_experts)
                   : dots<1, kExperts>(from, weight, width, to, num_experts);
        else
          are_four ? dots<4, 1>(from, weight, width, to, num_experts)
                   : dots<1, 1>(from, weight, width, to, num_experts);
        t += are_four ? 4 : 1;
      }
      e += is_tile ? kExperts : 1;
    }
  });
}

// The `count` largest of `value[0 .. n)`, ties to the lower number, NaN above all; `taken[i]` becomes 1.
static inline void take_largest(const float *value, int64_t n, int64_t count, uint8_t *taken) {
  for (; count > 0; count--) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
      if (!taken[i] && (best < 0 || value[i] > value[best] || (value[i] != value[i] && value[best] == value[best])))
        best = i;
    taken[best] = 1;
  }
}

// Neighbours in pairs, then their sums, as k2kernels.rows.tree_sum; x is lost.
static inline float tree_sum(float *x, int64_t n) {
  for (; n > 1; n = (n + 1) / 2)
    for (int64_t i = 0; i < (n + 1) / 2; i++)
      x[i] = 2 * i + 1 < n ? x[2 * i] + x[2 * i + 1] : x[2 * i] + 0.0f;
  return x[0];
}

static inline void topk_row(const float *logit, const float *bias, int64_t num_experts, const K2Rule &rule,
                            float *memory, int64_t *expert, float *weight) {
  float *score = memory, *choice = memory + num_experts + 16;
  uint8_t *taken = (uint8_t *)(memory + 2 * (num_experts + 16)), *group_taken = taken + num_experts;
  for (int64_t e = 0; e < num_experts; e += 16) {
    const int64_t n = num_experts - e;
    const Vec s = sigmoid(n >= 16 ? load(logit + e) : load_some(logit + e, int(n)));
    store(score + e, s);
    store(choice + e, s + (n >= 16 ? load(bias + e) : load_some(bias + e, int(n))));
  }
  memset(taken, 0, size_t(num_experts));
  if (rule.top_k_groups < rule.num_groups) {
    const int64_t size = num_experts / rule.num_groups;
    float *group_score = memory + 3 * (num_experts + 16);
    for (int64_t g = 0; g < rule.num_groups; g++) {
      const float *of = choice + g * size;
      int64_t best = 0, second = -1;
      for (int64_t i = 1; i < size; i++)
        if (of[i] > of[best])
          second = best, best = i;
        else if (second < 0 || of[i] > of[second])
          second = i;
      group_score[g] = second < 0 ? of[best] + 0.0f : of[best] + of[second];
    }
    memset(group_taken, 0, size_t(rule.num_groups));
    take_largest(group_score, rule.num_groups, rule.top_k_groups, group_taken);
    for (int64_t e = 0; e < num_experts; e++)
      if (!group_taken[e / size])
        choice[e] = -__builtin_inff();
  }
  take_largest(choice, num_experts, rule.top_k, taken);
  int64_t k = 0;
  for (int64_t e = 0; e < num_experts; e++)
    if (taken[e]) {
      expert[k] = e;
      weight[k] = choice[k] = score[e]; // k <= e: choices up to here are not needed any more
      k++;
    }
  if (rule.normalises) {
    const float total = tree_sum(choice, rule.top_k) + 1e-20f;
    for (k = 0; k < rule.top_k; k++)
      weight[k] = weight[k] / total;
  }
  for (k = 0; k < rule.top_k; k++)
    weight[k] = weight[k] * rule.scale;
}

static void router_topk(int threads, const float *logit, const float *bias, int64_t num_rows, int64_t num_experts,
                        const K2Rule *rule, int64_t *expert, float *weight) {
  for_rows(threads, num_rows, [&](int64_t t) {
    float *memory = (float *)k2_scratch(K2_SCRATCH_SUMS, size_t(4 * (num_experts + 16) + rule->num_groups) * 4);
    topk_row(logit + t * num_experts, bias, num_experts, *rule, memory, expert + t * rule->top_k,
             weight + t * rule->top_k);
  });
}
