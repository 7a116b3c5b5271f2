// What Python and this library agree on: `k2kernels/native/library.py` has the same structures and signatures.
// Strides count elements unless they say bytes. bf16 is the upper half of a float32.
#pragma once
#include <cstdint>

constexpr int kPanels = 4; // of a group

enum { K2_FP8 = 0, K2_BF16 = 1 };            // how a packed weight's elements are kept
enum { K2_ROWS_BF16 = 0, K2_ROWS_E4M3 = 1 }; // what activations come as
enum { K2_OUT_BF16 = 0, K2_OUT_F32 = 1 };
enum { K2_AVX2, K2_AVX512, K2_AVX512_BF16, K2_AMX };

// One linear, or many of one shape ("slots"), in panels of 16 outputs (fewer where a scale block ends). Four
// panels, the last time perhaps fewer, make a group, which is read from its first byte to its last:
//
//   group     k block 0 of each panel | k block 1 of each | ...     a block has `block` inputs, padded to 32
//   fp8       4 inputs x 16 outputs in 64 bytes    such that two byte-unpacks give two pairs, as bf16
//   bf16      2 inputs x 16 outputs in 64 bytes    output by output: what AMX and VDPBF16PS read
struct K2Packed {
  int32_t kind, are_acts_quantised; // in groups of `block`, by kernels that take them in bfloat16
  int32_t block, num_panels, num_blocks;
  int64_t num_inputs, num_outputs, panel_bytes;
  const uint8_t *data;   // [slots][panels * panel_bytes]
  const float *scale;    // [slots][panels][blocks]; null: no scales
  const int32_t *column; // [panels]: the output of a panel's first row
  const int32_t *width;  // [panels]: 1..16
};

// Activations: bfloat16 (quantised on the way where the weights say so), or e4m3 with scales.
struct K2Rows {
  int32_t kind;
  int64_t num_rows, stride_bytes; // of a row
  const uint8_t *data;
  int64_t scale_stride_bytes;
  const uint8_t *scale; // float32, perhaps unaligned
  const int64_t *index; // row i is number index[i] of data; null: i itself
};

// One layer's latents: places of `width` values; place = page * page_tokens + offset.
struct K2Cache {
  const uint16_t *data;
  int64_t width, page_tokens;
};

struct K2Decode {
  const uint16_t *q; // [rows][heads][width], rows q_row_stride apart
  int64_t num_rows, num_heads, q_row_stride;
  K2Cache cache;
  const int64_t *pages;
  int64_t page_stride;
  const int64_t *length;
  int64_t latent_width;
  float scale;
  uint16_t *out; // [rows][heads][latent]
};

struct K2Prefill {
  const uint16_t *q; // [rows][heads][nope + rope], rows and heads at their strides
  int64_t num_rows, num_heads, nope, rope, q_row_stride, q_head_stride;
  K2Cache cache;
  const int64_t *pages;
  int64_t start;
  const K2Packed *w_uk; // a slot per head: latent -> nope
  const K2Packed *w_uv; // latent -> value
  float scale;
  uint16_t *out; // [rows][heads][value]
};

struct K2Rule {
  int64_t top_k, num_groups, top_k_groups;
  int32_t normalises;
  float scale;
};

// Attention of one layer by a lane of one rank, for generated rows only.
struct K2Attention {
  const K2Packed *qkv_a, *q_b, *w_uk, *w_uv, *o; // w_uk, w_uv: a slot per head, as `heads` takes them
  const uint16_t *q_norm, *kv_norm;
  int64_t num_heads, q_rank, latent, nope, rope, value;
  float eps, scale;
};

// Rows of a step: row t is at position[t], sees length[t] keys, and writes its latent to place[t].
struct K2Generated {
  int64_t num_rows;
  const float *cosine, *sine; // of all positions, rope / 2 each
  const int64_t *position, *place, *length, *pages;
  int64_t page_stride, page_tokens;
};

// A layer of experts, all of them on this rank: slot[e] holds expert e.
struct K2Moe {
  const K2Packed *shared_gate_up, *shared_down, *gate_up, *down;
  const float *router, *bias;
  const int32_t *slot;
  int64_t num_experts, num_slots;
  K2Rule rule;
};

// A decoder layer of a lane of one rank that holds all experts. gate_up, down: of a dense one, else null.
struct K2Layer {
  const uint16_t *attention_norm, *mlp_norm;
  K2Attention attention;
  const K2Packed *gate_up, *down;
  K2Moe moe;
  uint16_t *cache; // places of latent + rope
  int64_t *counts; // [slots], of experts
};

struct K2Ops {
  // Rows are sorted by slot, counts[s] of slot s.
  void (*linear)(int threads, const K2Packed *w, int64_t num_slots, const int64_t *counts, const K2Rows *x, void *y,
                 int out_kind, int64_t y_stride);
  void (*mlp)(int threads, const K2Packed *gate_up, const K2Packed *down, int64_t num_slots, const int64_t *counts,
              const K2Rows *x, void *y, int out_kind);
  void (*act_quant)(int threads, const uint16_t *x, int64_t num_rows, int64_t width, int64_t x_stride, int block,
                    uint8_t *q, int64_t q_stride_bytes, uint8_t *scale, int64_t scale_stride_bytes);
  void (*rmsnorm)(int threads, const uint16_t *x, const uint16_t *weight, int64_t num_rows, int64_t width,
                  int64_t x_stride, float eps, uint16_t *y, int64_t y_stride);
  void (*rope)(int threads, const uint16_t *x, int64_t num_rows, int64_t heads, int64_t pairs, int64_t x_row_stride,
               int64_t x_head_stride, const float *cosine, const float *sine, uint16_t *y, int64_t y_row_stride,
               int64_t y_head_stride);
  void (*swiglu)(int threads, const uint16_t *h, int64_t num_rows, int64_t width, uint16_t *y);
  void (*weighted_sum)(int threads, const uint16_t *out, const float *weight, const float *shared, int64_t num_rows,
                       int64_t top_k, int64_t width, void *y, int out_kind);
  void (*latent_write)(int threads, uint16_t *cache, int64_t width, const int64_t *place, int64_t num_rows,
                       const uint16_t *latent, int64_t latent_stride, int64_t latent_width, const uint16_t *key,
                       int64_t key_stride);
  void (*heads)(int threads, const K2Packed *w, const uint16_t *x, int64_t num_rows, int64_t num_heads,
                int64_t x_row_stride, int64_t x_head_stride, uint16_t *y, int64_t y_row_stride, int64_t y_head_stride);
  void (*router_logits)(int threads, const uint16_t *x, int64_t num_rows, int64_t width, int64_t x_stride,
                        const float *w, int64_t num_experts, float *y);
  void (*router_topk)(int threads, const float *logit, const float *bias, int64_t num_rows, int64_t num_experts,
                      const K2Rule *rule, int64_t *expert, float *weight);
  void (*mla_decode)(int threads, const K2Decode *args);
  void (*mla_prefill)(int threads, const K2Prefill *args);
  // cache: places of latent + rope; y: [rows][outputs of o], bfloat16.
  void (*attention)(int threads, const K2Attention *w, const K2Generated *rows, const uint16_t *x, int64_t x_stride,
                    uint16_t *cache, uint16_t *y);
  // out: room for [rows * top_k][width] outputs of experts; y: [rows][width]; counts: [slots], pairs of each.
  void (*moe)(int threads, const K2Moe *w, const uint16_t *x, int64_t num_rows, int64_t x_stride, uint16_t *out,
              uint16_t *y, int64_t *counts);
  // h: the stream, contiguous, used up; y: what the last layer leaves, by `norm`. out: as of moe.
  void (*layers)(int threads, const K2Layer *layers, int64_t num_layers, const uint16_t *norm, int64_t width, float eps,
                 const K2Generated *rows, uint16_t *h, uint16_t *out, uint16_t *y);
};
