#define K2_NAMESPACE k2_avx512
#include "isa.h"
