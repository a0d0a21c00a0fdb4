// Loss and classes of logits that are upsampled on the fly.
//
// The logits [N,C,H,W] are values at coarse nodes. Between the node rows Y and Y + 1 lies interval Y: the pixel rows
// whose lower neighbor is Y. In the column x of an interval, all pixels are between the same four nodes of a class. So
// a thread takes a column of an interval and walks through the classes or the rows with two values per class: the
// logits of that column on the two node rows.
//
// segmentation_loss takes four kernels, without atomics:
//   pixel_kernel       the loss, and per pixel two numbers from which the softmax and the gradient of every class
//                      follow. The losses are summed per block.
//   vertical_kernel    the gradient on node rows at full width, [N,C,H,w]: sums over pixel rows. The softmax of a
//                      class is recomputed from the two numbers.
//   horizontal_kernel  the gradient at the nodes, [N,C,H,W]: sums over pixel columns.
//   total_kernel       the sum over blocks of pixel_kernel.
//
// pixel_kernel and coarse_kernel compute the probability of the true class. A pixel is compared with a threshold that
// may be its own probability, so both must get the same bits: they share compute_softmax and probability_of, which use
// operations that the compiler does not fuse.
#include "../loss.h"

#include <algorithm>
#include <limits>

#include "../../../cc_attention/csrc/cuda/device.h"

namespace fused {
namespace {

namespace device = cc_attention::device;
using device::kAllLanes;
using device::kWarp;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kNodeRows = 8;  // maximum per thread of vertical_kernel, which computes one interval more than that

// Pixel rows that a thread works on at a time. They share the loads of logits, and their exponentials overlap.
template <class S>
constexpr int kRows = sizeof(S) == 4 ? 8 : 4;

// Maximum number of rows or columns. Up to here, the error of a position in float32 is less than a pixel.
constexpr int64_t kLongest = 1 << 22;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The shares of the lower and the upper neighbor in an interpolated value.
template <class S>
struct Weights {
  S lower, upper;
  __device__ S blend(S a, S b) const { return device::fused_multiply_add(upper, b, device::multiply(lower, a)); }
};

// Upsampling along an axis, with aligned corners. Positions, in S, are those of PyTorch.
template <class S>
struct Axis {
  int coarse, fine;  // number of nodes and of pixels
  S scale;           // nodes per pixel
  S inverse;         // pixels per node, or 0

  Axis(int64_t nodes, int64_t pixels)
      : coarse(static_cast<int>(nodes)),
        fine(static_cast<int>(pixels)),
        scale(fine > 1 ? static_cast<S>(coarse - 1) / static_cast<S>(fine - 1) : 0),
        inverse(scale > 0 ? 1 / scale : 0) {}

  __device__ S position(int pixel) const { return device::multiply(scale, static_cast<S>(pixel)); }
  // The neighbors of a pixel are nodes `lower` and lower + step(lower). The last node has no upper neighbor; without
  // upsampling, none has. Its share is then 0 but for rounding, which the gradient leaves out.
  __device__ int lower(int pixel) const { return static_cast<int>(position(pixel)); }
  __device__ int step(int node) const { return node + 1 < coarse && coarse != fine ? 1 : 0; }
  __device__ Weights<S> weights(int pixel, int lower) const {
    const S upper = position(pixel) - static_cast<S>(lower);
    return {1 - upper, upper};
  }

  // Returns the first pixel of interval `node`, or of the next one that has pixels.
  __device__ int first(int node) const {
    if (node <= 0) return 0;
    if (node >= coarse) return fine;
    int pixel = max(static_cast<int>(static_cast<S>(node) * inverse) - 1, 0);  // rounding does not exceed one pixel
    while (pixel < fine && lower(pixel) < node) ++pixel;
    return pixel;
  }
};

template <class S>
struct Upsampling {
  Axis<S> rows, columns;
  int classes;
  const S* logits;

  explicit Upsampling(const Logits& input)
      : rows(input.sizes.H, input.sizes.h),
        columns(input.sizes.W, input.sizes.w),
        classes(static_cast<int>(input.sizes.C)),
        logits(static_cast<const S*>(input.logits)) {}

  // The number of nodes and of pixels of an image. They fit in 32 bits, like every index in an image (see fits).
  __device__ int nodes() const { return rows.coarse * columns.coarse; }
  __device__ int pixels() const { return rows.fine * columns.fine; }
};

// The column x of interval `node` of an image.
template <class S>
struct Column {
  const S* corner;  // the node above and to the left of the pixels, class 0
  int plane;
  int right, down;  // distances to the other corners
  Weights<S> weights;

  __device__ Column(const Upsampling<S>& a, int image, int node, int x) : plane(a.nodes()) {
    const int left = a.columns.lower(x);
    corner = a.logits + static_cast<int64_t>(image) * a.classes * plane + (node * a.columns.coarse + left);
    right = a.columns.step(left);
    down = a.rows.step(node) * a.columns.coarse;
    weights = a.columns.weights(x, left);
  }

  // The logits on the node rows above and below the pixels.
  __device__ S above(int c) const { return blend(c * plane); }
  __device__ S below(int c) const { return blend(c * plane + down); }

 private:
  __device__ S blend(int node) const { return weights.blend(corner[node], corner[node + right]); }
};

// Returns exp(a - b). As in PyTorch, the numbers are subtracted first: of large ones, little else would remain.
__device__ __forceinline__ float exp_difference(float a, float b) {
  constexpr float kLog2e = 1.4426950408889634f;
  return device::exp2_approximate(device::multiply(a - b, kLog2e));
}
__device__ __forceinline__ double exp_difference(double a, double b) { return exp(a - b); }

// exp(logit - top) / total is the softmax of a pixel.
template <class S>
struct Softmax {
  S top;  // the largest logit
  S total;
};

// Computes the softmax of some pixels of a column.
template <int R, class S>
__device__ __forceinline__ void compute_softmax(const Column<S>& column, int classes, const Weights<S> (&rows)[R],
                                                Softmax<S> (&result)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) result[r] = {-INFINITY, 0};
  for (int c = 0; c < classes; ++c) {
    const S above = column.above(c), below = column.below(c);
#pragma unroll
    for (int r = 0; r < R; ++r) result[r].top = std::fmax(result[r].top, rows[r].blend(above, below));
  }
  for (int c = 0; c < classes; ++c) {
    const S above = column.above(c), below = column.below(c);
#pragma unroll
    for (int r = 0; r < R; ++r)
      result[r].total = device::add(result[r].total, exp_difference(rows[r].blend(above, below), result[r].top));
  }
}

template <class S>
__device__ __forceinline__ S probability_of(S logit, const Softmax<S>& softmax) {
  return exp_difference(logit, softmax.top) / softmax.total;
}

// The targets of the pixels and the weights of the classes.
template <class S>
struct Labels {
  const int64_t* target;
  int64_t ignored;
  int classes;
  const S* class_weights;

  __device__ bool is_class(int64_t label) const { return 0 <= label && label < classes; }
  __device__ S weight(int64_t label) const {
    if (!is_class(label)) return NAN;
    return class_weights ? class_weights[label] : 1;
  }
};

// An item of work, one per thread. Every image has the same number of items, in blocks of its own.
struct Item {
  int image, index;
  bool exists;
  explicit __device__ Item(int items) {
    const unsigned blocks = (items + kThreads - 1u) / kThreads;
    image = blockIdx.x / blocks;
    index = blockIdx.x % blocks * kThreads + threadIdx.x;
    exists = index < items;
  }
};

// What pixel_kernel keeps of a pixel. The gradient of the logit of class c is exp(logit - top) * scale, minus the
// weight of the class if c is the target. The scale is the weight / total; it is 0 if the pixel does not count.
template <class S>
struct alignas(2 * sizeof(S)) Pixel {
  S top, scale;
};

struct Sums {
  double loss, weight;
};

// Returns the sum over the threads of the block, in a fixed order, in thread 0.
__device__ Sums block_sum(Sums own) {
  __shared__ Sums parts[kWarps];
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    own.loss += __shfl_xor_sync(kAllLanes, own.loss, lanes);
    own.weight += __shfl_xor_sync(kAllLanes, own.weight, lanes);
  }
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = own;
  __syncthreads();
  for (int warp = 1; warp < kWarps; ++warp) {
    own.loss += parts[warp].loss;
    own.weight += parts[warp].weight;
  }
  return own;
}

// An item is a column of an interval.
template <class S>
__global__ void __launch_bounds__(kThreads)
    pixel_kernel(Upsampling<S> a, Labels<S> labels, const S* threshold, Pixel<S>* pixels, Sums* block_sums) {
  constexpr int R = kRows<S>;
  Sums own{0, 0};
  const Item item(a.rows.coarse * a.columns.fine);
  if (item.exists) {
    const int width = a.columns.fine, node = item.index / width, x = item.index % width;
    const Column<S> column(a, item.image, node, x);
    const int64_t* const target = labels.target + (static_cast<int64_t>(item.image) * a.pixels() + x);
    pixels += static_cast<int64_t>(item.image) * a.pixels() + x;
    const int end = a.rows.first(node + 1);
    for (int first = a.rows.first(node); first < end; first += R) {
      Weights<S> rows[R];
      Softmax<S> softmax[R];
#pragma unroll
      for (int r = 0; r < R; ++r) rows[r] = a.rows.weights(min(first + r, end - 1), node);
      compute_softmax(column, a.classes, rows, softmax);
      S loss = 0, weights = 0;  // of R pixels in S: some GPUs are slow in double
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (first + r >= end) continue;
        const int64_t label = target[(first + r) * width];
        S scale = 0;
        if (label != labels.ignored) {
          const int c = static_cast<int>(label);
          const S logit = labels.is_class(label) ? rows[r].blend(column.above(c), column.below(c)) : NAN;
          if (!threshold || !(probability_of(logit, softmax[r]) > *threshold)) {  // NaN counts
            const S weight = labels.weight(label);
            loss += weight * (std::log(softmax[r].total) - (logit - softmax[r].top));
            weights += weight;
            scale = weight / softmax[r].total;
          }
        }
        pixels[(first + r) * width] = {softmax[r].top, scale};
      }
      own.loss += loss;
      own.weight += weights;
    }
  }
  own = block_sum(own);
  if (threadIdx.x == 0) block_sums[blockIdx.x] = own;
}

template <class S>
__global__ void __launch_bounds__(kThreads) total_kernel(const Sums* block_sums, int blocks, S* totals) {
  Sums own{0, 0};
  for (int block = threadIdx.x; block < blocks; block += kThreads) {
    own.loss += block_sums[block].loss;
    own.weight += block_sums[block].weight;
  }
  own = block_sum(own);
  if (threadIdx.x == 0) {
    totals[0] = static_cast<S>(own.loss);
    totals[1] = static_cast<S>(own.weight);
  }
}

// An item is a pixel column, a strip of node rows and K classes. A node row gets gradients from the interval above it
// and from the interval below it, so the thread carries sums from one interval to the next. Without upsampling, a node
// row does not depend on others; then a strip must be one node row.
template <class S, int K>
__global__ void __launch_bounds__(kThreads)
    vertical_kernel(Upsampling<S> a, Labels<S> labels, const Pixel<S>* pixels, int node_rows, S* vertical) {
  const int width = a.columns.fine, height = a.rows.coarse, groups = (a.classes + K - 1) / K;
  const Item item((height + node_rows - 1) / node_rows * groups * width);
  if (!item.exists) return;
  const int x = item.index % width, first_class = item.index / width % groups * K;
  const int first_node = item.index / width / groups * node_rows, end_node = min(first_node + node_rows, height);
  const int node_before = first_node - (first_node > 0 ? a.rows.step(first_node - 1) : 0), plane = height * width;
  const int64_t* const target = labels.target + (static_cast<int64_t>(item.image) * a.pixels() + x);
  pixels += static_cast<int64_t>(item.image) * a.pixels() + x;
  vertical += static_cast<int64_t>(item.image) * a.classes * plane + (first_class * plane + node_before * width + x);

  const auto class_of = [&](int k) { return min(first_class + k, a.classes - 1); };  // the last group may be short
  S below[K], sums[K] = {};
  const Column<S> start(a, item.image, node_before, x);
#pragma unroll
  for (int k = 0; k < K; ++k) below[k] = start.above(class_of(k));
  int y = a.rows.first(node_before);
  for (int node = node_before; node < end_node; ++node) {
    const Column<S> column(a, item.image, node, x);
    S above[K], next[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      above[k] = below[k];
      below[k] = column.below(class_of(k));
    }
    for (const int end = a.rows.first(node + 1); y < end; ++y) {
      const int64_t label = target[y * width];
      const Pixel<S> pixel = pixels[y * width];
      if (pixel.scale == 0) continue;
      const S weight = labels.weight(label);
      const int own = labels.is_class(label) ? static_cast<int>(label) - first_class : -1;
      const Weights<S> row = a.rows.weights(y, node);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const S probability = exp_difference(row.blend(above[k], below[k]), pixel.top) * pixel.scale;
        const S gradient = probability - (own == k ? weight : 0);
        sums[k] += row.lower * gradient;
        next[k] += row.upper * gradient;
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (node >= first_node && first_class + k < a.classes) vertical[k * plane] = sums[k];
      sums[k] = next[k];
    }
    vertical += width;
  }
}

// An item is an element of the gradient.
template <class S>
__global__ void __launch_bounds__(kThreads) horizontal_kernel(Upsampling<S> a, const S* vertical, S* grad) {
  const int items = a.classes * a.nodes();
  const Item item(items);
  if (!item.exists) return;
  const int node = item.index % a.columns.coarse, line = item.index / a.columns.coarse;
  const int64_t lines = static_cast<int64_t>(item.image) * a.classes * a.rows.coarse + line;
  const S* const pixels = vertical + lines * a.columns.fine;
  const int middle = a.columns.first(node), end = a.columns.first(node + 1);
  S sum = 0;
  for (int x = a.columns.first(node - 1); x < middle; ++x) sum += a.columns.weights(x, node - 1).upper * pixels[x];
  for (int x = middle; x < end; ++x) sum += a.columns.weights(x, node).lower * pixels[x];
  grad[static_cast<int64_t>(item.image) * items + item.index] = sum;
}

// An axis of the coarse grid of OHEM (loss.h).
struct Zoom {
  int samples, pixels;
  double step;

  Zoom(int64_t samples_, int64_t pixels_)
      : samples(static_cast<int>(samples_)),
        pixels(static_cast<int>(pixels_)),
        step(samples > 1 ? static_cast<double>(pixels - 1) / (samples - 1) : 1) {}

  struct Sample {
    bool inside;
    int lower, upper, nearest;  // pixels
    Weights<double> weights;
  };
  __device__ Sample sample(int i) const {
    const double position = device::multiply(static_cast<double>(i), step), upper = position - std::floor(position);
    const int lower = static_cast<int>(position);
    return {position <= pixels - 1,
            lower,
            min(lower + 1, pixels - 1),
            static_cast<int>(std::floor(position + 0.5)),
            {1 - upper, upper}};
  }
};

// An item is a sample.
template <class S>
__global__ void __launch_bounds__(kThreads)
    coarse_kernel(Upsampling<S> a, Labels<S> labels, Zoom vertical, Zoom horizontal, S* result) {
  const int items = vertical.samples * horizontal.samples;
  const Item item(items);
  if (!item.exists) return;
  const Zoom::Sample row = vertical.sample(item.index / horizontal.samples);
  const Zoom::Sample column = horizontal.sample(item.index % horizontal.samples);
  const bool inside = row.inside && column.inside;
  const int64_t* const target = labels.target + static_cast<int64_t>(item.image) * a.pixels();
  const int64_t label = inside ? target[row.nearest * a.columns.fine + column.nearest] : 0;
  double sum = 0;
  if (label == labels.ignored) {
    sum = INFINITY;
  } else if (!labels.is_class(label)) {
    sum = NAN;
  } else if (inside) {
#pragma unroll 1
    for (int corner = 0; corner < 4; ++corner) {
      const int y = corner / 2 ? row.upper : row.lower, x = corner % 2 ? column.upper : column.lower;
      const int node = a.rows.lower(y), c = static_cast<int>(label);
      const Column<S> pixels(a, item.image, node, x);
      const Weights<S> rows[1] = {a.rows.weights(y, node)};
      Softmax<S> softmax[1];
      compute_softmax(pixels, a.classes, rows, softmax);
      const double probability = probability_of(rows[0].blend(pixels.above(c), pixels.below(c)), softmax[0]);
      const double y_weight = corner / 2 ? row.weights.upper : row.weights.lower;
      const double x_weight = corner % 2 ? column.weights.upper : column.weights.lower;
      sum = device::add(sum, device::multiply(device::multiply(probability, y_weight), x_weight));
    }
  }
  result[static_cast<int64_t>(item.image) * items + item.index] = static_cast<S>(sum);
}

// An item is a column of an interval. The 1 allows more than 64 registers; some compilers would rather spill.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) class_kernel(Upsampling<S> a, uint8_t* classes) {
  constexpr int R = kRows<S>;
  const Item item(a.rows.coarse * a.columns.fine);
  if (!item.exists) return;
  const int width = a.columns.fine, node = item.index / width, x = item.index % width;
  const Column<S> column(a, item.image, node, x);
  const int end = a.rows.first(node + 1);
  classes += static_cast<int64_t>(item.image) * a.pixels() + x;
  for (int first = a.rows.first(node); first < end; first += R) {
    Weights<S> rows[R];
    S best[R];
    int best_class[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      rows[r] = a.rows.weights(min(first + r, end - 1), node);
      best[r] = -INFINITY;
      best_class[r] = 0;
    }
    for (int c = 0; c < a.classes; ++c) {
      const S above = column.above(c), below = column.below(c);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const S logit = rows[r].blend(above, below);
        if (logit > best[r] || logit != logit) {  // no logit is larger than NaN
          best[r] = logit;
          best_class[r] = c;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (first + r < end)
        classes[(first + r) * width] = static_cast<uint8_t>(best[r] == best[r] ? best_class[r] : 255);
  }
}

// The kernels number the elements of an image with 32 bits.
bool fits(int64_t elements) { return elements <= std::numeric_limits<int>::max() - kThreads; }
bool fits(const LossSizes& s) {
  return fits(s.C * s.H * std::max(s.W, s.w)) && fits(s.h * s.w) && std::max({s.H, s.W, s.h, s.w}) <= kLongest;
}

// Queues kernel launches. After a launch fails, the following ones are skipped.
struct Queue {
  void* stream;
  int error = cudaSuccess;

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) {
    if (error != cudaSuccess || blocks == 0) return;
    if (blocks > std::numeric_limits<int>::max()) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    error = device::launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, arguments...);
  }

  // Launches a thread for each item of each image.
  template <class... Parameters, class... Arguments>
  void launch_items(void (*kernel)(Parameters...), int64_t images, int64_t items, Arguments... arguments) {
    launch(kernel, images * ceil_div(items, kThreads), arguments...);
  }
};

// The parts of the workspace.
template <class S>
struct Workspace {
  int64_t blocks;  // of pixel_kernel
  int64_t pixels;
  int64_t vertical;

  explicit Workspace(const LossSizes& s)
      : blocks(s.N * ceil_div(s.H * s.w, kThreads)), pixels(s.N * s.h * s.w), vertical(s.N * s.C * s.H * s.w) {}
  int64_t bytes() const { return blocks * sizeof(Sums) + pixels * sizeof(Pixel<S>) + vertical * sizeof(S); }
};

template <class S, int K>
void launch_vertical(Queue& queue, const LossSizes& s, const Upsampling<S>& a, const Labels<S>& labels,
                     const Pixel<S>* pixels, S* vertical) {
  const int node_rows = s.H == s.h ? 1 : kNodeRows;
  const int64_t items = ceil_div(s.H, node_rows) * ceil_div(s.C, K) * s.w;
  queue.launch_items(vertical_kernel<S, K>, s.N, items, a, labels, pixels, node_rows, vertical);
}

template <class S>
int run_loss(const SegmentationLoss& arguments, void* stream) {
  const LossSizes& s = arguments.input.sizes;
  const Workspace<S> workspace(s);
  const auto block_sums = static_cast<Sums*>(arguments.workspace);
  const auto pixels = reinterpret_cast<Pixel<S>*>(block_sums + workspace.blocks);  // [N,h,w]
  const auto vertical = reinterpret_cast<S*>(pixels + workspace.pixels);           // [N,C,H,w]
  const Upsampling<S> a(arguments.input);
  const Labels<S> labels{arguments.target, arguments.ignored, a.classes,
                         static_cast<const S*>(arguments.class_weights)};

  Queue queue{stream};
  queue.launch_items(pixel_kernel<S>, s.N, s.H * s.w, a, labels, static_cast<const S*>(arguments.threshold), pixels,
                     block_sums);
  queue.launch(total_kernel<S>, 1, block_sums, static_cast<int>(workspace.blocks), static_cast<S*>(arguments.totals));
  if (arguments.grad) {
    // Groups of 5 classes where groups of 10 would have more empty places.
    if (ceil_div(s.C, 5) * 5 < ceil_div(s.C, 10) * 10)
      launch_vertical<S, 5>(queue, s, a, labels, pixels, vertical);
    else
      launch_vertical<S, 10>(queue, s, a, labels, pixels, vertical);
    queue.launch_items(horizontal_kernel<S>, s.N, s.C * s.H * s.W, a, vertical, static_cast<S*>(arguments.grad));
  }
  return queue.error;
}

template <class S>
int run_coarse(const CoarseProbability& arguments, void* stream) {
  const LossSizes& s = arguments.input.sizes;
  const Upsampling<S> a(arguments.input);
  const Labels<S> labels{arguments.target, arguments.ignored, a.classes, nullptr};
  Queue queue{stream};
  queue.launch_items(coarse_kernel<S>, s.N, arguments.rows * arguments.columns, a, labels, Zoom(arguments.rows, s.h),
                     Zoom(arguments.columns, s.w), static_cast<S*>(arguments.probability));
  return queue.error;
}

template <class S>
int run_classes(const UpsampledClasses& arguments, void* stream) {
  const LossSizes& s = arguments.input.sizes;
  Queue queue{stream};
  queue.launch_items(class_kernel<S>, s.N, s.H * s.w, Upsampling<S>(arguments.input), arguments.classes);
  return queue.error;
}

}  // namespace

int segmentation_loss_cuda(const SegmentationLoss& arguments, void* stream) {
  if (!fits(arguments.input.sizes)) return cudaErrorInvalidConfiguration;
  return arguments.input.wide ? run_loss<double>(arguments, stream) : run_loss<float>(arguments, stream);
}

int coarse_probability_cuda(const CoarseProbability& arguments, void* stream) {
  if (!fits(arguments.input.sizes) || !fits(arguments.rows * arguments.columns)) return cudaErrorInvalidConfiguration;
  return arguments.input.wide ? run_coarse<double>(arguments, stream) : run_coarse<float>(arguments, stream);
}

int upsampled_classes_cuda(const UpsampledClasses& arguments, void* stream) {
  if (!fits(arguments.input.sizes)) return cudaErrorInvalidConfiguration;
  return arguments.input.wide ? run_classes<double>(arguments, stream) : run_classes<float>(arguments, stream);
}

int64_t loss_workspace_cuda(bool wide, const LossSizes& sizes) {
  return wide ? Workspace<double>(sizes).bytes() : Workspace<float>(sizes).bytes();
}

}  // namespace fused
