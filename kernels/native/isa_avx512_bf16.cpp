#define K2_NAMESPACE k2_avx512_bf16
#define K2_USE_DPBF16
#include "isa.h"
