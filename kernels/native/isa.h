// One ISA's whole library: a file defines K2_NAMESPACE, perhaps K2_AMX or K2_DPBF16, and includes this. Only C
// headers come in: a template of the standard library compiled here could replace its like on a lesser machine.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "abi.h"
#include "pool.h"

namespace K2_NAMESPACE {
#include "vec.h"

#include "weights.h"

#include "multiply.h"

#include "few.h"

#include "lay.h"

#include "linear.h"

#include "elementwise.h"

#include "router.h"

#include "attend.h"

#include "mla_decode.h"

#include "mla_prefill.h"

#include "whole.h"

extern const K2Ops ops;
const K2Ops ops = {
    linear,       mlp,         act_quant, rmsnorm,       rope,        swiglu,
    weighted_sum, latent_write, heads,    router_logits, router_topk, mla_decode, mla_prefill, attention, moe, layers,
};
} // namespace K2_NAMESPACE
