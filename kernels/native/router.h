// The router: float32 logits, and the choice of experts, whose ties go to the lower number.
#pragma once

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
