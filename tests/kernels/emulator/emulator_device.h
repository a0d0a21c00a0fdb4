// The instructions of cc_attention/csrc/cuda/device.h on the CPU. That file includes this one inside its namespace, in
// the place of its own wrappers, and says there what each of them does.

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ float to_sum(float16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <>
__device__ __forceinline__ float16 from_sum<float16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

// Functions of their own, or the compiler could fuse them with other operations.
[[gnu::noinline]] inline float multiply(float a, float b) { return a * b; }
[[gnu::noinline]] inline double multiply(double a, double b) { return a * b; }
[[gnu::noinline]] inline float add(float a, float b) { return a + b; }
[[gnu::noinline]] inline double add(double a, double b) { return a + b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

inline float exp2_approximate(float x) {
  emulator::interrupt();
  const float result = std::exp2(x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

using emulator::dynamic_shared;

inline unsigned take_ticket(unsigned* counter, emulator::Where where = emulator::Where::current()) {
  return emulator::take_ticket(counter, where);
}
inline void add_to_counter(unsigned* counter, emulator::Where where = emulator::Where::current()) {
  emulator::add_to_counter(counter, where);
}
inline void wait_for_counter(const unsigned* counter, unsigned least,
                             emulator::Where where = emulator::Where::current()) {
  emulator::wait_for_counter(counter, least, where);
}

inline cudaError_t set_zero(void* memory, int64_t bytes, void*) {
  memset(memory, 0, bytes);
  return cudaSuccess;
}

inline void store_words(void* global, const uint32_t (&words)[4]) {
  emulator::interrupt();
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("the address in global memory is not a multiple of 16");
  memcpy(global, words, sizeof words);
}

inline void copy_async(void* shared, const void* global, bool valid,
                       emulator::Where where = emulator::Where::current()) {
  emulator::copy_async(shared, global, valid, where);
}

using emulator::commit_copies;

template <int pending>
void wait_for_copies(emulator::Where where = emulator::Where::current()) {
  static_assert(pending >= 0);
  emulator::wait_for_copies(pending, where);
}

struct Matrices {
  uint32_t* out;
  const uint16_t* row;
};

template <bool transposed>
void execute_load(void* const* arguments, uint32_t) {
  const auto lane = [arguments](int i) { return static_cast<const Matrices*>(arguments[i]); };
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < 4; ++i) {
      const int slow = l / 4, fast = 2 * (l % 4);
      const auto element = [&](int row, int column) { return lane(8 * i + row)->row[column]; };
      const uint32_t low = transposed ? element(fast, slow) : element(slow, fast);
      const uint32_t high = transposed ? element(fast + 1, slow) : element(slow, fast + 1);
      lane(l)->out[i] = low | high << 16;
    }
}

inline void load_matrices(uint32_t (&out)[4], const void* row, emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"load_matrices", true, execute_load<false>};
  emulator::check_shared_row(operation.name, row, where);
  Matrices operand{out, static_cast<const uint16_t*>(row)};
  emulator::collective(operation, kAllLanes, &operand, where);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row,
                                     emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"load_matrices_transposed", true, execute_load<true>};
  emulator::check_shared_row(operation.name, row, where);
  Matrices operand{out, static_cast<const uint16_t*>(row)};
  emulator::collective(operation, kAllLanes, &operand, where);
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// A tensor core leaves out the low 13 bits of a float32: a number that has them was not rounded to tf32, which is taken
// for an error. What is not finite may have them: uninitialized memory is NaN, and allowed where nothing comes of it.
inline float to_factor(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (bits & 0x1fff && std::isfinite(x)) emulator::fail("an operand is not a tf32 number");
  return std::bit_cast<float>(bits & ~0x1fffu);
}
template <class T>
float to_factor(T x) {
  return to_sum(x);
}

// Element number `half` of a word of T.
template <class T>
T element(uint32_t word, int half) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(word);
  else
    return {static_cast<uint16_t>(word >> 16 * half)};
}

template <class T>
void execute_product(void* const* arguments, uint32_t) {
  using Row = float __attribute__((vector_size(32)));
  constexpr int kPerWord = 4 / sizeof(T), kDepth = 8 * kPerWord;
  uint32_t a_words[8][16], b_words[8][8];  // transposed: words of neighboring rows side by side
  Row d[16];
  for (int l = 0; l < kWarp; ++l) {
    const Product own = *static_cast<const Product*>(arguments[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) a_words[t + i / 2 * 4][g + i % 2 * 8] = own.a[i];
    for (int i = 0; i < 2; ++i) b_words[t + i * 4][g] = own.b[i];
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = own.d[i];
  }
  for (int k = 0; k < kDepth; ++k) {
    float a[16];
    Row b;
    for (int m = 0; m < 16; ++m) a[m] = to_factor(element<T>(a_words[k / kPerWord][m], k % kPerWord));
    for (int n = 0; n < 8; ++n) b[n] = to_factor(element<T>(b_words[k / kPerWord][n], k % kPerWord));
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) d[m] += a[m] * b;
  }
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < 4; ++i)
      static_cast<const Product*>(arguments[l])->d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulator::Where where = emulator::Where::current()) {
  static_assert(!std::is_same_v<T, double>);
  static constexpr emulator::Operation operation{"multiply_add", true, execute_product<T>};
  Product operand{d, a, {b0, b1}};
  emulator::collective(operation, kAllLanes, &operand, where);
}

__device__ __forceinline__ uint32_t round_tf32(float x) {
  if (std::isnan(x)) return 0x7fffe000;
  return (std::bit_cast<uint32_t>(x) + 0x1000) & ~0x1fffu;  // carries into the exponent as it should
}

template <class T>
uint32_t pack(float low, float high) {
  emulator::interrupt();
  return from_sum<T>(low).bits | static_cast<uint32_t>(from_sum<T>(high).bits) << 16;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared_bytes, void*,
                   Arguments... arguments) {
  const auto run = [=] { kernel(arguments...); };
  return emulator::launch(
      grid, block, shared_bytes, [](const void* run_) { (*static_cast<const decltype(run)*>(run_))(); }, &run);
}
