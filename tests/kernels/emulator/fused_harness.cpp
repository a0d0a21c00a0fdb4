// The functions of norm.h and loss.h for the GPU, under names that Python can look up.
#include "../loss.h"  // of the copy of the sources that build() makes
#include "../norm.h"

using namespace fused;
