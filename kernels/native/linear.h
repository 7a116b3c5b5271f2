// Linears, and MLPs of two of them, of one or of many slots: work cut into tasks, one for a group of panels.
#pragma once

constexpr int64_t kChunkRows = 512; // of one task: its sums take 128 KiB

// acc[m][16 i ..] = x[first + m] . panel i of group `group`; how many panels it has.
static int multiply_group(const K2Packed *w, int64_t slot, int group, const Laid &laid, int64_t first,
                          int64_t num_rows, float *acc) {
  const int first_panel = group * kPanels, panels = int(least(kPanels, w->num_panels - first_panel));
  constexpr int64_t stride = 16 * kPanels;
  Wt *scratch = (Wt *)k2_scratch(K2_SCRATCH_WEIGHTS, sizeof(Wt) * kPanels * kBlockMax * 16);
  memset(acc, 0, size_t(num_rows * stride) * 4);
  const uint8_t *source = w->data + (slot * w->num_panels + first_panel) * w->panel_bytes;
  const float *scale = w->scale ? w->scale + (slot * w->num_panels + first_panel) * w->num_blocks : nullptr;
  const unsigned before = begin_multiply();
  if (num_rows <= kFewRows)
    multiply_few(w, source, scale, panels, laid, first, int(num_rows), acc, stride);
#if defined(K2_USE_AMX)
  else if (num_rows <= 16)
    multiply_16(w, source, scale, panels, laid, first, int(num_rows), scratch, acc, stride);
#endif
  else
    multiply_many(w, source, scale, panels, laid, first, int(num_rows), scratch, acc, stride);
  end_multiply(before);
  return panels;
}

static inline void put_out(void *y, int out_kind, int64_t at, Vec x, int n) {
  if (out_kind == K2_OUT_F32) {
    float *to = (float *)y + at;
    n == 16 ? store(to, x) : store_some(to, x, n);
  } else {
    bf16 *to = (bf16 *)y + at;
    n == 16 ? store_bf16(to, x) : store_bf16_some(to, x, n);
  }
}

// Rows [first, first + num_rows) of y = x w^T for a group of panels.
static void linear_task(const K2Packed *w, int64_t slot, int group, const Laid &laid, int64_t first,
                        int64_t num_rows, void *y, int out_kind, int64_t y_stride) {
  float *acc = (float *)k2_scratch(K2_SCRATCH_SUMS, size_t(num_rows) * 16 * kPanels * 4);
  const int panels = multiply_group(w, slot, group, laid, first, num_rows, acc);
  for (int64_t m = 0; m < num_rows; m++)
    for (int p = 0; p < panels; p++)
      put_out(y, out_kind, (first + m) * y_stride + w->column[group * kPanels + p],
              load(acc + m * 16 * kPanels + 16 * p), w->width[group * kPanels + p]);
}

// Rows are sorted by slot, counts[s] of slot s. A task is a group of panels for a part: one slot's rows, or a
// chunk of them.
struct Part {
  int64_t slot, first, num_rows;
};

static inline int64_t count_parts(int64_t num_slots, const int64_t *counts) {
  int64_t num_parts = 0;
  for (int64_t s = 0; s < num_slots; s++)
    num_parts += (counts[s] + kChunkRows - 1) / kChunkRows;
  return num_parts;
}

static inline void put_parts(int64_t num_slots, const int64_t *counts, Part *part) {
  int64_t row = 0;
  for (int64_t s = 0; s < num_slots; s++)
    for (int64_t left = counts[s]; left > 0; left -= kChunkRows) {
      *part++ = {s, row, least(kChunkRows, left)};
      row += least(kChunkRows, left);
    }
}

static void linear(int threads, const K2Packed *w, int64_t num_slots, const int64_t *counts, const K2Rows *rows,
                   void *y, int out_kind, int64_t y_stride) {
  const int64_t groups = (w->num_panels + kPanels - 1) / kPanels, num_parts = count_parts(num_slots, counts);
  Part *parts = (Part *)k2_scratch(K2_SCRATCH_INNER, size_t(num_parts) * sizeof(Part));
  put_parts(num_slots, counts, parts);
  const Laid laid = lay(threads, w, rows, K2_SCRATCH_ROWS);
  parallel(threads, num_parts * groups, [&](int64_t task) {
    const Part &p = parts[task / groups];
    linear_task(w, p.slot, int(task % groups), laid, p.first, p.num_rows, y, out_kind, y_stride);
  });
}
// y[t, h] = x[t, h] w[h]^T: a slot of `w` per head.
static void heads(int threads, const K2Packed *w, const bf16 *x, int64_t num_rows, int64_t num_heads,
                  int64_t x_row_stride, int64_t x_head_stride, bf16 *y, int64_t y_row_stride, int64_t y_head_stride) {
  const int64_t groups = (w->num_panels + kPanels - 1) / kPanels;
  const int64_t chunks = (num_rows + kChunkRows - 1) / kChunkRows;
  parallel(threads, num_heads * chunks, [&](int64_t task) {
    const int64_t h = task % num_heads, first = task / num_heads * kChunkRows;
    const int64_t rows_here = least(kChunkRows, num_rows - first);
    const K2Rows rows = {K2_ROWS_BF16, rows_here, x_row_stride * 2,
                         (const uint8_t *)(x + first * x_row_stride + h * x_head_stride), 0, nullptr, nullptr};
    const Laid laid = lay(1, w, &rows, K2_SCRATCH_ROWS);
    for (int64_t group = 0; group < groups; group++)
      linear_task(w, h, int(group), laid, 0, rows_here, y + first * y_row_stride + h * y_head_stride, K2_OUT_BF16,
                  y_row_stride);
  });
}

// -- MLPs: down(silu(gate x) * (up x)), of one or of many slots ----------------------------------------------

// The inner values of rows [first, first + num_rows) for a group: half its panels are of gate, half of up.
static void inner_task(const K2Packed *w, int64_t slot, int group, const Laid &laid, int64_t first,
                       int64_t num_rows, bf16 *inner, int64_t width) {
  float *acc = (float *)k2_scratch(K2_SCRATCH_SUMS, size_t(num_rows) * 16 * kPanels * 4);
  const int pairs = multiply_group(w, slot, group, laid, first, num_rows, acc) / 2;
  const int32_t *columns = w->column + group * kPanels, *widths = w->width + group * kPanels;
  for (int64_t m = 0; m < num_rows; m++)
    for (int i = 0; i < pairs; i++) {
      bf16 both[32]; // gate and up are results of a linear: rounded
      store_bf16(both, load(acc + m * 16 * kPanels + 16 * i));
      store_bf16(both + 16, load(acc + m * 16 * kPanels + 16 * (pairs + i)));
      const Vec gate = load_bf16(both), up = load_bf16(both + 16);
      const Vec value = gate * sigmoid(gate) * up;
      const int n = widths[i];
      bf16 *to = inner + (first + m) * width + columns[i];
      n == 16 ? store_bf16(to, value) : store_bf16_some(to, value, n);
    }
}

// One MLP of many slots, whose rows are laid out for `gate_up`. y: contiguous, rows as of `linear`.
struct Mlp {
  const K2Packed *gate_up, *down;
  int64_t num_slots;
  const int64_t *counts;
  Laid laid;
  void *y;
  int out_kind;
  // From here on of `mlps_laid`.
  int64_t num_parts = 0;
  Part *parts = nullptr;
  bf16 *inner = nullptr;
  Laid inner_laid = {};

  int64_t num_inner_tasks() const { return num_parts * ((gate_up->num_panels + kPanels - 1) / kPanels); }
  int64_t num_lay_tasks() const { return (laid.rows + kLayRows - 1) / kLayRows; }
  int64_t num_out_tasks() const { return num_parts * ((down->num_panels + kPanels - 1) / kPanels); }

  void inner_task_of(int64_t task) {
    const Part &p = parts[task / (num_inner_tasks() / num_parts)];
    const int group = int(task % (num_inner_tasks() / num_parts));
    inner_task(gate_up, p.slot, group, laid, p.first, p.num_rows, inner, down->num_inputs);
  }
  void lay_task_of(int64_t task) {
    const K2Rows rows = bf16_rows(inner, laid.rows, down->num_inputs);
    for (int64_t i = task * kLayRows; i < least((task + 1) * kLayRows, laid.rows); i++)
      lay_row(down, &rows, i, inner_laid, i);
  }
  void out_task_of(int64_t task) {
    const Part &p = parts[task / (num_out_tasks() / num_parts)];
    const int group = int(task % (num_out_tasks() / num_parts));
    linear_task(down, p.slot, group, inner_laid, p.first, p.num_rows, y, out_kind, down->num_outputs);
  }
};

// All tasks of one kind of up to two MLPs, as one job: fewer waits for the last thread.
static void run_mlps(int threads, Mlp *mlps, int num_mlps, int64_t (Mlp::*count)() const, void (Mlp::*run)(int64_t)) {
  const int64_t first = (mlps[0].*count)(), second = num_mlps > 1 ? (mlps[1].*count)() : 0;
  parallel(threads, first + second, [&](int64_t task) {
    task < first ? (mlps[0].*run)(task) : (mlps[1].*run)(task - first);
  });
}

static void mlps_laid(int threads, Mlp *mlps, int num_mlps) {
  take_pieces(K2_SCRATCH_INNER, [&](Pieces &pieces) {
    for (int i = 0; i < num_mlps; i++) {
      Mlp &m = mlps[i];
      m.num_parts = count_parts(m.num_slots, m.counts);
      m.parts = pieces.take<Part>(m.num_parts);
      m.inner = pieces.take<bf16>(m.laid.rows * m.down->num_inputs);
    }
  });
  for (int i = 0; i < num_mlps; i++) {
    put_parts(mlps[i].num_slots, mlps[i].counts, mlps[i].parts);
    mlps[i].inner_laid = laid_out(mlps[i].down, mlps[i].laid.rows, K2_SCRATCH_INNER_ROWS + i);
  }
  run_mlps(threads, mlps, num_mlps, &Mlp::num_inner_tasks, &Mlp::inner_task_of);
  run_mlps(threads, mlps, num_mlps, &Mlp::num_lay_tasks, &Mlp::lay_task_of);
  run_mlps(threads, mlps, num_mlps, &Mlp::num_out_tasks, &Mlp::out_task_of);
}

static void mlp(int threads, const K2Packed *gate_up, const K2Packed *down, int64_t num_slots,
                const int64_t *counts, const K2Rows *rows, void *y, int out_kind) {
  Mlp one = {gate_up, down, num_slots, counts, lay(threads, gate_up, rows, K2_SCRATCH_ROWS), y, out_kind};
  mlps_laid(threads, &one, 1);
}
