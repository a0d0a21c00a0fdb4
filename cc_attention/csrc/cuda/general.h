// Kernels for every dtype and architecture, any number of channels and lines of any length (see general.cu). Each
// function queues its work on the stream (a cudaStream_t) and returns the cudaError_t of the launches as an int.
#pragma once

#include "../kernels.h"

namespace cc_attention::general {

int forward(const Forward& arguments, void* stream);
int backward(const Backward& arguments, void* stream);
int primitive(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out,
              void* stream);

// Returns the size of Backward::workspace in bytes.
int64_t backward_workspace(Dtype dtype, const Sizes& sizes);

}  // namespace cc_attention::general
