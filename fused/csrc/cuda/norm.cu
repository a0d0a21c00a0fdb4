#include "../../../cc_attention/csrc/cuda/device.h"
#include "../norm.h"
