// Attention of prompt rows on keys and values made from the latents, some heads at a time.
#pragma once

constexpr int64_t kHeadBytes = 64 << 20; // of keys and values made at a time

// Keys and values of one head and one tile.
static void decompress(const K2Prefill &a, int64_t head, int64_t tile, const Laid &laid, Key *keys, int width,
                       Value *values) {
  const int64_t begin = tile * kTileKeys, num_keys = least(kTileKeys, a.start + a.num_rows - begin);
  const int64_t latent = a.w_uk->num_inputs, value_width = a.w_uv->num_outputs;
  float *acc = (float *)k2_scratch(K2_SCRATCH_SUMS, kTileKeys * 16 * kPanels * 4 + size_t(kTileKeys * value_width) * 2);
  bf16 *made = (bf16 *)(acc + kTileKeys * 16 * kPanels);
  auto multiply_groups = [&](const K2Packed *w, auto put) {
    for (int p = 0; p < w->num_panels; p += kPanels) {
      const int panels = multiply_group(w, head, p / kPanels, laid, begin, num_keys, acc);
      for (int64_t j = 0; j < num_keys; j++)
        for (int i = 0; i < panels; i++)
          put(j, w->column[p + i], load(acc + j * 16 * kPanels + 16 * i), w->width[p + i]);
    }
  };
  memset(keys, 0, size_t(kTileKeys) * size_t(width) * sizeof(Key));
  multiply_groups(a.w_uk, [&](int64_t j, int column, Vec x, int n) {
    bf16 rounded[16];
    store_bf16(rounded, x);
    put_act(keys + j * width + column, load_bf16(rounded), n);
  });
  for (int64_t j = 0; j < num_keys; j++)
    copy_row(keys + j * width + a.nope, cached(a.cache, a.pages, begin + j) + latent, a.rope);
  multiply_groups(a.w_uv, [&](int64_t j, int column, Vec x, int n) { store_bf16_some(made + j * value_width + column, x, n); });
  lay_values(values, value_width, [&](int j) -> const bf16 * { return j < num_keys ? made + j * value_width : nullptr; });
}

// 16 rows of one head over the tiles that they see.
static void prompt_task(const K2Prefill &a, int64_t head, int64_t first, const Key *keys, int width,
                        const Value *values) {
  const int value_width = int(round_up(a.w_uv->num_outputs, 16)), num_lanes = int(least(kLanes, a.num_rows - first));
  const size_t query_bytes = size_t(width) * kLanes * sizeof(Query);
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_SUMS, query_bytes + size_t(kLanes) * size_t(value_width) * 4);
  Query *q = (Query *)memory;
  Lanes lanes;
  lanes.sum = (float *)(memory + query_bytes);
  clear(lanes, value_width);
  put_queries(q, a.q + first * a.q_row_stride + head * a.q_head_stride, a.q_row_stride, num_lanes, a.nope + a.rope, width);
  begin_attention();
  for (int64_t begin = 0; begin < a.start + first + num_lanes; begin += kTileKeys) {
    int limit[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const int64_t seen = i < num_lanes ? a.start + first + i + 1 - begin : 0;
      limit[i] = int(seen < 0 ? 0 : least(kTileKeys, seen));
    }
    attend_tile(q, keys + begin * width, width, values + begin * value_width, value_width, limit, a.scale, num_lanes,
                Ahead{}, lanes);
  }
  end_attention();
  for (int i = 0; i < num_lanes; i++)
    for (int64_t v = 0; v < a.w_uv->num_outputs; v += 16) {
      const Vec out = load(lanes.sum + i * value_width + v) / set1(lanes.l[i]) + zero();
      bf16 *to = a.out + ((first + i) * a.num_heads + head) * a.w_uv->num_outputs + v;
      store_bf16_some(to, out, int(least(16, a.w_uv->num_outputs - v)));
    }
}

static void mla_prefill(int threads, const K2Prefill *args) {
  const K2Prefill &a = *args;
  const int64_t num_keys = a.start + a.num_rows, tiles = (num_keys + kTileKeys - 1) / kTileKeys;
  const int width = int(round_up(a.nope + a.rope, 32));
  const int64_t value_width = round_up(a.w_uv->num_outputs, 16);
  int64_t *place = (int64_t *)k2_scratch(K2_SCRATCH_PLACES, size_t(num_keys) * 8);
  for (int64_t s = 0; s < num_keys; s++)
    place[s] = (cached(a.cache, a.pages, s) - a.cache.data) / a.cache.width;
  const K2Rows latents = {K2_ROWS_BF16, num_keys, a.cache.width * 2, (const uint8_t *)a.cache.data, 0, nullptr, place};
  const Laid laid = lay(threads, a.w_uk, &latents, K2_SCRATCH_ROWS);
  const int64_t key_bytes = tiles * kTileKeys * width * int64_t(sizeof(Key));
  const int64_t value_bytes = tiles * kTileKeys * value_width * int64_t(sizeof(Value));
  int64_t at_once = kHeadBytes / (key_bytes + value_bytes);
  at_once = at_once < 1 ? 1 : least(at_once, a.num_heads);
  uint8_t *memory = (uint8_t *)k2_scratch(K2_SCRATCH_INNER, size_t(at_once * (key_bytes + value_bytes)));
  const int64_t blocks = (a.num_rows + kLanes - 1) / kLanes;
  for (int64_t head = 0; head < a.num_heads; head += at_once) {
    const int64_t heads = least(at_once, a.num_heads - head);
    auto keys = [&](int64_t h) { return (Key *)(memory + h * (key_bytes + value_bytes)); };
    auto values = [&](int64_t h) { return (Value *)(memory + h * (key_bytes + value_bytes) + key_bytes); };
    parallel(threads, heads * tiles, [&](int64_t task) {
      const int64_t h = task / tiles, tile = task % tiles;
      decompress(a, head + h, tile, laid, keys(h) + tile * kTileKeys * width, width,
                 values(h) + tile * kTileKeys * value_width);
    });
    parallel(threads, heads * blocks, [&](int64_t task) {
      const int64_t h = task / blocks, block = blocks - 1 - task % blocks; // the longest first
      prompt_task(a, head + h, block * kLanes, keys(h), width, values(h));
    });
  }
}
