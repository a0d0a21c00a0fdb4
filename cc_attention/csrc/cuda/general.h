// Kernels for every dtype, every architecture, any number of channels and lines of any length: see general.cu. Each
// function queues its work on the stream (a cudaStream_t) and returns the cudaError_t of the launches.
#pragma once

#include "../kernels.h"

namespace cc_attention::general {

int forward(const Forward& arguments, void* stream);
int backward(const Backward& arguments, void* stream);
int primitive(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out,
              void* stream);

// Bytes of Backward::workspace.
int64_t backward_workspace(Dtype dtype, const Sizes& sizes);

}  // namespace cc_attention::general
