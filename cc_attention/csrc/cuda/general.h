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
int64_t backward_workspace(const Backward& arguments);

// sum = the sum of `count` numbers in Sum<T>, in an order that depends only on their count. The workspace has
// total_bytes() bytes, aligned to 8.
int total(Dtype dtype, const void* numbers, int64_t count, void* workspace, void* sum, void* stream);
int64_t total_bytes();

}  // namespace cc_attention::general
