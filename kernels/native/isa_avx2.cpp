#define K2_NAMESPACE k2_avx2
#include "isa.h"
