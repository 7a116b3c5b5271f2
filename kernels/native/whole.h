// Half layers and whole ones in one call: the steps, as one after the other would give them.
#pragma once

// Columns of `a`: query latent, latent, rotary key. All in place but for the cache.
static void norm_and_store(int threads, const K2Attention &w, const K2Generated &g, bf16 *a, bf16 *cache) {
  const int64_t width = w.latent + w.rope, stride = w.q_rank + width, pairs = w.rope / 2;
  for_rows(threads, g.num_rows, [&](int64_t t) {
    bf16 *q = a + t * stride, *latent = q + w.q_rank, *key = latent + w.latent;
    rmsnorm_row(q, w.q_norm, w.q_rank, w.eps, q);
    rmsnorm_row(latent, w.kv_norm, w.latent, w.eps, latent);
    rope_row(key, g.cosine + g.position[t] * pairs, g.sine + g.position[t] * pairs, pairs, key);
    memcpy(cache + g.place[t] * width, latent, size_t(width) * 2);
  });
}

static void attention(int threads, const K2Attention *args, const K2Generated *rows, const bf16 *x, int64_t x_stride,
                      bf16 *cache, bf16 *y) {
  const K2Attention &w = *args;
  const K2Generated &g = *rows;
  const int64_t T = g.num_rows, H = w.num_heads, head = w.nope + w.rope, key = w.latent + w.rope;
  const int64_t compressed = w.q_rank + key, pairs = w.rope / 2;
  bf16 *a, *q, *absorbed, *found, *values;
  take_pieces(K2_SCRATCH_WHOLE, [&](Pieces &p) {
    a = p.take<bf16>(T * compressed);
    q = p.take<bf16>(T * H * head);
    absorbed = p.take<bf16>(T * H * key);
    found = p.take<bf16>(T * H * w.latent);
    values = p.take<bf16>(T * H * w.value);
  });
  const K2Rows x_rows = bf16_rows(x, T, x_stride);
  linear(threads, w.qkv_a, 1, &T, &x_rows, a, K2_OUT_BF16, compressed);
  norm_and_store(threads, w, g, a, cache);
  const K2Rows q_latents = bf16_rows(a, T, compressed);
  linear(threads, w.q_b, 1, &T, &q_latents, q, K2_OUT_BF16, H * head);
  for_rows(threads, T, [&](int64_t t) {
    for (int64_t h = 0; h < H; h++)
      rope_row(q + (t * H + h) * head + w.nope, g.cosine + g.position[t] * pairs, g.sine + g.position[t] * pairs, pairs,
               absorbed + (t * H + h) * key + w.latent);
  });
  heads(threads, w.w_uk, q, T, H, H * head, head, absorbed, H * key, key);
  const K2Decode decode = {absorbed, T, H, H * key, {cache, key, g.page_tokens}, g.pages, g.page_stride, g.length,
                           w.latent, w.scale, found};
  mla_decode(threads, &decode);
  heads(threads, w.w_uv, found, T, H, H * w.latent, w.latent, values, H * w.value, w.value);
  const K2Rows v = bf16_rows(values, T, H * w.value);
  linear(threads, w.o, 1, &T, &v, y, K2_OUT_BF16, w.o->num_outputs);
}

// Pairs of row and expert by slot, then row, then k. home[pair]: its place among them; row[place]: its row.
static void sort_pairs(const K2Moe &w, int64_t num_rows, const int64_t *expert, int64_t *counts, int64_t *next,
                       int64_t *home, int64_t *row) {
  const int64_t top_k = w.rule.top_k, num_pairs = num_rows * top_k;
  memset(counts, 0, size_t(w.num_slots) * 8);
  for (int64_t pair = 0; pair < num_pairs; pair++)
    counts[w.slot[expert[pair]]]++;
  for (int64_t s = 0, sum = 0; s < w.num_slots; s++) {
    next[s] = sum;
    sum += counts[s];
  }
  for (int64_t pair = 0; pair < num_pairs; pair++) {
    home[pair] = next[w.slot[expert[pair]]]++;
    row[home[pair]] = pair / top_k;
  }
}

static void moe(int threads, const K2Moe *args, const bf16 *x, int64_t num_rows, int64_t x_stride, bf16 *out, bf16 *y,
                int64_t *counts) {
  const K2Moe &w = *args;
  const int64_t width = w.gate_up->num_inputs, top_k = w.rule.top_k;
  float *logit, *weight, *shared;
  int64_t *expert, *next, *home, *row;
  take_pieces(K2_SCRATCH_WHOLE, [&](Pieces &p) {
    logit = p.take<float>(num_rows * w.num_experts);
    weight = p.take<float>(num_rows * top_k);
    shared = p.take<float>(num_rows * width);
    expert = p.take<int64_t>(num_rows * top_k);
    next = p.take<int64_t>(w.num_slots);
    home = p.take<int64_t>(num_rows * top_k);
    row = p.take<int64_t>(num_rows * top_k);
  });
  router_logits(threads, x, num_rows, width, x_stride, w.router, w.num_experts, logit);
  router_topk(threads, logit, w.bias, num_rows, w.num_experts, &w.rule, expert, weight);
  sort_pairs(w, num_rows, expert, counts, next, home, row);
  const K2Rows rows = bf16_rows(x, num_rows, x_stride);
  const Laid one = lay(threads, w.gate_up, &rows, K2_SCRATCH_ROWS); // the shared expert takes them alike
  const Laid laid = lay_again(threads, w.gate_up, one, row, num_rows * top_k, K2_SCRATCH_PAIRS);
  Mlp mlps[] = {{w.gate_up, w.down, w.num_slots, counts, laid, out, K2_OUT_BF16},
                {w.shared_gate_up, w.shared_down, 1, &num_rows, one, shared, K2_OUT_F32}};
  mlps_laid(threads, mlps, 2);
  weighted_sum_of(threads, out, home, weight, shared, num_rows, top_k, width, y, K2_OUT_BF16);
}

static inline void add_row(bf16 *h, const bf16 *more, int64_t width) {
  for (int64_t k = 0; k < width; k += 16)
    put_bf16(h + k, get_bf16(h + k, width - k) + get_bf16(more + k, width - k), width - k);
}

static void layers(int threads, const K2Layer *all, int64_t num_layers, const bf16 *last_norm, int64_t width, float eps,
                   const K2Generated *rows, bf16 *h, bf16 *out, bf16 *y) {
  const int64_t T = rows->num_rows;
  bf16 *x, *delta;
  take_pieces(K2_SCRATCH_LAYERS, [&](Pieces &p) {
    x = p.take<bf16>(T * width);
    delta = p.take<bf16>(T * width);
  });
  // What the half layer before gave goes into the stream, which is normed for the next.
  auto next = [&](const bf16 *more, const bf16 *norm, bf16 *to) {
    for_rows(threads, T, [&](int64_t t) {
      if (more)
        add_row(h + t * width, more + t * width, width);
      rmsnorm_row(h + t * width, norm, width, eps, to + t * width);
    });
  };
  for (int64_t i = 0; i < num_layers; i++) {
    const K2Layer &layer = all[i];
    next(i ? delta : nullptr, layer.attention_norm, x);
    attention(threads, &layer.attention, rows, x, width, layer.cache, delta);
    next(delta, layer.mlp_norm, x);
    if (layer.gate_up) {
      const K2Rows x_rows = bf16_rows(x, T, width);
      mlp(threads, layer.gate_up, layer.down, 1, &T, &x_rows, delta, K2_OUT_BF16);
    } else {
      moe(threads, &layer.moe, x, T, width, out, delta, layer.counts);
    }
  }
  next(num_layers ? delta : nullptr, last_norm, y);
}
