#define K2_NAMESPACE k2_amx
#define K2_USE_AMX
#include "isa.h"
