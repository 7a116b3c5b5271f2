// Products of activation rows with packed weights.
//
// One order of sums for every number of rows, so that a row's bits depend on it alone: along each block of
// (128) inputs in the order of the instruction below, from zero; then acc = fma(that, x scale * w scale, acc),
// block by block. Rows are never split along inputs.
//
//   AMX              TDPBF16PS, 32 inputs at a time; for few rows its definition, by FMA (few.h)
//   AVX512-BF16      VDPBF16PS, 2 at a time         both factors are e4m3 values, exact in bfloat16
//   AVX-512, AVX2    float32 FMA, 1 at a time
//
//   Act        an activation as the instruction reads it       Wt    a weight likewise
//   ready      one panel's block, ready to multiply: in `scratch`, or where it lies
//   multiply      acc[m][16 p ..] += (a[m] . b[p]) * sx[m] * sw[p]    m < num_rows, p < kPanels at most
#pragma once

constexpr int kBlockMax = 128; // inputs; larger scale blocks are refused when weights are packed

#if defined(K2_USE_AMX) || defined(K2_USE_DPBF16)
using Act = bf16;
using Wt = bf16;
#else
using Act = float;
using Wt = float;
#endif

// Rows laid out for `multiply`: block after block, in each row after row; padded with zeros to the weights' depth.
struct Laid {
  Act *a;
  float *sx; // [blocks][rows]
  int64_t rows;
  int64_t stride; // between blocks, of one row
};

#if defined(K2_USE_AMX)
#include "multiply_amx.h"
#else
#include "multiply_vec.h"
#endif
