// The emulator's engine: fibers, the schedules, blocks over OS threads, and the checks. emulator.h tells the idea.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <link.h>
#endif

// x86-64 switches stacks by a few instructions; other processors by the C library, several times slower.
#if !defined(__x86_64__) || defined(CC_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define CC_ASSEMBLY 0
#else
#define CC_ASSEMBLY 1
#endif

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

constexpr int kLanes = 32, kMaxWarps = 32, kMaxThreads = kLanes * kMaxWarps;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 16 * 1024;  // around the dynamic shared memory
constexpr int kPoison = 0xff;              // NaN in every floating-point type

#if CC_ASSEMBLY

struct Context {
  void* stack_pointer;
};

// Saves the registers that a function has to keep on the stack, and the stack pointer in *from; goes on where `to` was
// saved. The return lands behind the call of another fiber: in the same function as a rule, so that it is predicted.
extern "C" void cc_emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.globl cc_emulator_switch
.hidden cc_emulator_switch
.type cc_emulator_switch, @function
cc_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cc_emulator_switch, . - cc_emulator_switch
)");

void switch_context(Context& from, const Context& to) { cc_emulator_switch(&from.stack_pointer, to.stack_pointer); }

void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);  // a multiple of 16
  *--top = nullptr;                                      // the entry's own return address: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

#else

using Context = ucontext_t;

void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

// A fiber's stack; an overflow meets a page without access.
class Stack {
 public:
  Stack() {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<unsigned char*>(p);
    mprotect(begin_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(begin_, kStackBytes); }
  unsigned char* begin() const { return begin_; }

 private:
  unsigned char* begin_;
};

struct Range {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* p, size_t count) const {
    const auto* q = static_cast<const unsigned char*>(p);
    return q >= begin && q + count <= begin + bytes;
  }
};

struct Copy {
  void* shared;
  const void* global;  // null: zeros
  int group;
  unsigned char issued[16];  // the source at that time
};

struct Fiber {
  Context context;
  dim3 index;
  const char* operation = nullptr;  // what it does or waits for
  Where where;
  bool ended = false;
  std::vector<Copy> copies;  // issued and not waited for, from first_copy on
  size_t first_copy = 0;
  int group = 0;  // of the copies issued next
};

// A collective for which some lanes of the mask wait.
struct Meeting {
  const Operation* operation;
  Where where;
  uint32_t mask, arrived;
};

struct Warp {
  std::vector<Meeting> meetings;  // their masks differ
  void* arguments[kLanes];        // of the lanes that wait in them
  uint32_t ended = 0;
  uint32_t at_barrier = 0;
  Where barrier;  // of the lanes in at_barrier
};

enum class Order {
  rounds,    // every thread gets to its next wait before one goes on: by position
  priority,  // of the threads that can go on, the first by position: it runs ahead, the last lags behind
  random,    // any; and threads are interrupted besides
};

// Position of a thread in the order: its number with the bits of key flipped. 0: as they are; 1023: backwards.
struct Schedule {
  Order order = Order::rounds;
  uint32_t key = 0;
  uint64_t seed = 0;
};

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// The schedules by number: 0 in rounds, 1 in rounds backwards, 2 the first warp ahead and the last behind, 3 the
// opposite; from 4 on, even ones at random, odd ones with the warps and lanes in another order of priority.
Schedule numbered_schedule(int number) {
  const uint32_t backwards = kMaxThreads - 1;
  if (number < 4) return {number < 2 ? Order::rounds : Order::priority, number % 2 ? backwards : 0, 0};
  const uint64_t seed = mix(number);
  return {number % 2 ? Order::priority : Order::random, static_cast<uint32_t>(seed % kMaxThreads), seed};
}

bool same_place(const Where& a, const Where& b) { return a.line() == b.line() && a.column() == b.column(); }

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string text_of(const dim3& index) {
  std::ostringstream text;
  text << '(' << index.x << ", " << index.y << ", " << index.z << ')';
  return text.str();
}

// What the caller has set, and the first error since.
struct Settings {
  int number = 0;
  int os_threads = 1;
  int shared_limit = 0;
  int resident = 0;  // blocks that run in turns; 0: one on each OS thread, at the same time
} settings;
std::string first_error;
std::atomic<bool> failed{false};
std::mutex error_mutex;
std::atomic<int64_t> switches{0};
int largest_shared = 0;

void record_error(const std::string& message) {
  const std::lock_guard lock(error_mutex);
  if (!failed) first_error = message;
  failed = true;
}

// The shared variables that a kernel declares are all thread_local of this library; so are these few.
struct Local {
  unsigned char before[4096];  // the linker puts them behind the kernels' variables: overruns of the last end here
  class Runner* runner;
};
thread_local Local local;

// The memory of the calling OS thread that holds the library's thread_local variables.
Range thread_local_memory() {
  Range found;
#ifdef __linux__
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const Range range{static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
          if (info->dlpi_phdr[i].p_type != PT_TLS || !range.begin || !range.holds(&local, sizeof local)) continue;
          *static_cast<Range*>(result) = range;
          return 1;
        }
        return 0;
      },
      &found);
#endif
  return found;
}

uint32_t xorshift(uint64_t& state) {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>(state >> 32);
}

// The blocks that are resident, one in each worker (an OS thread), and how they wait for each other.
//
// In turns, one worker runs at a time. By order of priority, blocks without a ticket go first, so that all have one;
// then the block with the first ticket or, if the number of workers is even, that with the last.
class Residents {
 public:
  void begin(int workers, bool in_turns, const Schedule& schedule) {
    blocks_.assign(workers, {true});
    in_turns_ = in_turns;
    schedule_ = schedule;
    random_ = mix(schedule.seed) | 1;
    version_ = tickets_ = 0;
    turn_ = 0;
  }

  // Waits for the first turn of a worker.
  void enter(int worker) {
    std::unique_lock lock(mutex_);
    if (in_turns_) changed_.wait(lock, [&] { return turn_ == worker || failed; });
  }
  void start_block(int worker) {
    const std::lock_guard lock(mutex_);
    blocks_[worker] = {true};
  }
  void leave(int worker) {
    const std::lock_guard lock(mutex_);
    blocks_[worker].running = false;
    if (in_turns_) choose();
    changed_.notify_all();
  }

  unsigned take_ticket(int worker, unsigned* counter) {
    std::unique_lock lock(mutex_);
    blocks_[worker].ticket = tickets_++;
    const unsigned ticket = (*counter)++;
    let_others(worker, lock);
    return ticket;
  }
  void add(int worker, unsigned* counter) {
    std::unique_lock lock(mutex_);
    ++*counter;
    ++version_;
    changed_.notify_all();
    let_others(worker, lock);
  }
  void pause(int worker) {
    std::unique_lock lock(mutex_);
    let_others(worker, lock);
  }

  // Returns whether a counter has reached `least`, and otherwise sets the version of the counters that said so.
  bool reached(const unsigned* counter, unsigned least, uint64_t& version) {
    const std::lock_guard lock(mutex_);
    version = version_;
    return *counter >= least;
  }
  // Waits for other blocks until a counter has changed since `version`. Returns false if that can't happen.
  bool wait(int worker, uint64_t version) {
    std::unique_lock lock(mutex_);
    Block& own = blocks_[worker];
    own.waiting = true;
    own.version = version;
    const auto stuck = [&] {
      return std::none_of(blocks_.begin(), blocks_.end(), [&](const Block& b) { return can_go_on(b); });
    };
    if (stuck()) return false;
    let_others(worker, lock);
    changed_.wait(lock, [&] { return failed || can_go_on(own) || stuck(); });
    const bool changed = can_go_on(own) || failed;
    own.waiting = !changed;
    return changed;
  }

 private:
  struct Block {
    bool running = false, waiting = false;
    uint64_t version = 0, ticket = ~uint64_t{0};  // the highest: none yet
  };

  bool can_go_on(const Block& block) const { return block.running && !(block.waiting && block.version == version_); }

  // In turns: chooses who goes on; returns when the worker may, or something has failed.
  void let_others(int worker, std::unique_lock<std::mutex>& lock) {
    if (!in_turns_) return;
    choose();
    changed_.notify_all();
    changed_.wait(lock, [&] { return turn_ == worker || failed; });
  }

  void choose() {
    std::vector<int> able;
    for (int i = 1; i <= static_cast<int>(blocks_.size()); ++i) {  // in rounds: the first one behind this turn
      const int worker = (turn_ + i) % static_cast<int>(blocks_.size());
      if (can_go_on(blocks_[worker])) able.push_back(worker);
    }
    if (able.empty()) return;
    const auto place = [&](int worker) {
      const uint64_t ticket = blocks_[worker].ticket + 1;  // 0: none
      return blocks_.size() % 2 == 0 && ticket ? ~ticket : ticket;
    };
    if (schedule_.order == Order::random)
      turn_ = able[xorshift(random_) % able.size()];
    else if (schedule_.order == Order::rounds)
      turn_ = able[0];
    else
      turn_ = *std::min_element(able.begin(), able.end(), [&](int a, int b) { return place(a) < place(b); });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Block> blocks_;
  bool in_turns_ = false;
  Schedule schedule_;
  uint64_t random_ = 1, version_ = 0, tickets_ = 0;  // version: changes of counters so far
  int turn_ = 0;
} residents;

// Runs blocks, one after the other, on the OS thread that it is used on.
class Runner {
 public:
  explicit Runner(int worker) : worker_(worker) {}

  void begin(dim3 grid, int block, int shared_bytes, void (*call)(const void*), const void* kernel) {
    grid_ = grid;
    block_ = dim3(block);
    threads_ = block;
    call_ = call;
    kernel_ = kernel;
    shared_ = {nullptr, static_cast<size_t>(shared_bytes)};
    memory_.assign(128 + kGuardBytes + shared_.bytes + kGuardBytes, kPoison);
    auto address = reinterpret_cast<uintptr_t>(memory_.data()) + kGuardBytes;
    shared_.begin = reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
    fibers_.resize(threads_);
    while (static_cast<int>(stacks_.size()) < threads_) stacks_.push_back(std::make_unique<Stack>());
    warps_.resize((threads_ + kLanes - 1) / kLanes);
    local.runner = this;
    static_shared_ = thread_local_memory();
  }

  void run(dim3 index, uint64_t seed, const Schedule& schedule) {
    index_ = index;
    schedule_ = schedule;
    random_ = mix(seed) | 1;
    poison();
    for (size_t w = 0; w < warps_.size(); ++w) {
      const int lanes = std::min(kLanes, threads_ - static_cast<int>(w) * kLanes);
      warps_[w].meetings.clear();
      warps_[w].at_barrier = 0;
      warps_[w].ended = lanes == kLanes ? 0 : ~0u << lanes;  // the last warp may be short
    }
    alive_ = threads_;
    at_barrier_ = 0;
    ready_warps_ = 0;
    std::fill(std::begin(ready_), std::end(ready_), 0);
    for (int i = 0; i < threads_; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = dim3(i);
      fiber.operation = "its start";
      fiber.where = {};
      fiber.ended = false;
      fiber.copies.clear();
      fiber.first_copy = 0;
      fiber.group = 0;
      // Stacks that begin at the same distance from a page would use the same few lines of the caches.
      const size_t shift = i % 61 * 128;
      prepare(fiber.context, stacks_[i]->begin(), kStackBytes - shift, [] { local.runner->thread(); });
      make_ready(i);
    }
    polling_.clear();
    residents.start_block(worker_);
    position_ = kMaxThreads - 1;  // rounds start behind it, with the first position
    current_ = pick();
    ++switched_;
    switch_context(main_, fibers_[current_].context);
    if (!failed) check_guards();
    switches += switched_;
    switched_ = 0;
  }

  Fiber& fiber() { return fibers_[current_]; }
  const dim3& index() const { return index_; }
  const dim3& block() const { return block_; }
  const dim3& grid() const { return grid_; }
  unsigned char* shared() const { return shared_.begin; }

  [[noreturn, gnu::noinline]] void fail(const char* text) {
    const Fiber& own = fiber();
    std::ostringstream message;
    message << text << " (" << own.operation << " at " << place(own.where) << ", thread " << current_ << ", block "
            << text_of(index_) << ')';
    record_error(message.str());
    leave();
  }

  void collective(const Operation& operation, uint32_t mask, void* argument, Where where) {
    Warp& warp = warps_[current_ / kLanes];
    const uint32_t bit = 1u << current_ % kLanes;
    at(operation.name, where);
    if (!(mask & bit)) fail("the lane is not in its own mask");
    if (mask & warp.ended) fail("a lane of the mask has ended");
    size_t i = 0;
    while (i < warp.meetings.size() && warp.meetings[i].mask != mask) ++i;
    if (i == warp.meetings.size()) warp.meetings.push_back({&operation, where, mask, 0});
    Meeting& meeting = warp.meetings[i];
    if (meeting.operation != &operation || (operation.aligned && !same_place(meeting.where, where)))
      fail_of_divergence(meeting.operation->name, meeting.where);
    meeting.arrived |= bit;
    warp.arguments[current_ % kLanes] = argument;
    if (meeting.arrived == mask) {
      operation.execute(warp.arguments, mask);
      meeting = warp.meetings.back();
      warp.meetings.pop_back();
      make_ready(current_ / kLanes, mask);
    }
    next();
  }

  void block_barrier(Where where) {
    Warp& warp = warps_[current_ / kLanes];
    at("__syncthreads", where);
    if (warp.at_barrier && !same_place(warp.barrier, where)) fail_of_divergence("__syncthreads", warp.barrier);
    warp.barrier = where;
    warp.at_barrier |= 1u << current_ % kLanes;
    ++at_barrier_;
    if (open_barrier() && schedule_.order == Order::random && random() % 4 == 0) residents.pause(worker_);
    if (failed) leave();
    next();
  }

  unsigned take_ticket(unsigned* counter, Where where) {
    at("take_ticket", where);
    const unsigned ticket = residents.take_ticket(worker_, counter);
    if (failed) leave();
    return ticket;
  }

  void add_to_counter(unsigned* counter, Where where) {
    at("add_to_counter", where);
    residents.add(worker_, counter);
    if (failed) leave();
  }

  // Other threads of the block go on first.
  void wait_for_counter(const unsigned* counter, unsigned least, Where where) {
    at("wait_for_counter", where);
    for (uint64_t version; !residents.reached(counter, least, version);) {
      if (polling_.empty()) version_ = version;
      polling_.push_back(current_);
      next();
    }
  }

  void interrupt() {
    if (schedule_.order != Order::random || random() % 8) return;
    make_ready(current_);
    next();
  }

  void copy_async(void* shared, const void* global, bool valid, Where where) {
    check_shared_row("copy_async", shared, where);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16) fail("the address in global memory is not a multiple of 16");
    if (valid && (shared_.holds(global, 16) || static_shared_.holds(global, 16))) fail("the source is shared memory");
    interrupt();
    memset(shared, kPoison, 16);
    Copy copy{shared, valid ? global : nullptr, fiber().group, {}};
    if (valid) memcpy(copy.issued, global, 16);
    fiber().copies.push_back(copy);
  }

  void wait_for_copies(int pending, Where where) {
    at("wait_for_copies", where);
    interrupt();
    Fiber& own = fiber();
    for (; own.first_copy < own.copies.size(); ++own.first_copy) {
      const Copy& copy = own.copies[own.first_copy];
      if (copy.group >= own.group - pending) break;
      if (copy.global && memcmp(copy.issued, copy.global, 16)) fail("the source of a copy was written to meanwhile");
      memcpy(copy.shared, copy.issued, 16);
    }
    if (own.first_copy == own.copies.size()) {
      own.copies.clear();
      own.first_copy = 0;
    }
  }

  void check_shared_row(const char* name, const void* p, Where where) {
    at(name, where);
    if (!shared_.holds(p, 16) && !static_shared_.holds(p, 16)) fail("the address is not in the block's shared memory");
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("the address in shared memory is not a multiple of 16");
  }

 private:
  void at(const char* operation, Where where) {
    fiber().operation = operation;
    fiber().where = where;
  }

  [[noreturn, gnu::noinline]] void fail_of_divergence(const char* other, Where where) {
    fail(("lanes of a warp diverge: others are in " + std::string(other) + " at " + place(where)).c_str());
  }

  [[noreturn, gnu::noinline]] void fail_of_end(const Meeting& meeting) {
    const std::string text = "the thread ended while lanes of its warp wait for it in ";
    fail((text + meeting.operation->name + " at " + place(meeting.where)).c_str());
  }

  // A fiber's life.
  [[noreturn]] void thread() {
    call_(kernel_);
    Fiber& own = fiber();
    if (own.first_copy < own.copies.size()) fail("the thread ended with copies that it has not waited for");
    own.ended = true;
    Warp& warp = warps_[current_ / kLanes];
    warp.ended |= 1u << current_ % kLanes;
    for (const Meeting& meeting : warp.meetings)
      if (meeting.mask & warp.ended) fail_of_end(meeting);
    --alive_;
    if (alive_ == 0) leave();
    open_barrier();  // does not wait for threads that have ended
    next();
    __builtin_unreachable();
  }

  // Back to run(); the fibers are left as they are and never go on.
  [[noreturn]] void leave() {
    switch_context(fiber().context, main_);
    __builtin_unreachable();
  }

  bool open_barrier() {
    if (at_barrier_ < alive_) return false;
    at_barrier_ = 0;
    for (size_t w = 0; w < warps_.size(); ++w) {
      make_ready(static_cast<int>(w), warps_[w].at_barrier);
      warps_[w].at_barrier = 0;
    }
    return true;
  }

  // The threads that can go on, by position: a bit per lane, and a bit per warp that has any.
  void make_ready(int thread) {
    const uint32_t position = static_cast<uint32_t>(thread) ^ schedule_.key;
    ready_[position / kLanes] |= 1u << position % kLanes;
    ready_warps_ |= 1u << position / kLanes;
  }

  void make_ready(int warp, uint32_t lanes) {
    if (!lanes) return;
    // Flips the lanes' numbers: each bit of the key swaps neighboring groups of lanes.
    const uint32_t key = schedule_.key;
    if (key & 1) lanes = (lanes & 0x55555555) << 1 | (lanes >> 1 & 0x55555555);
    if (key & 2) lanes = (lanes & 0x33333333) << 2 | (lanes >> 2 & 0x33333333);
    if (key & 4) lanes = (lanes & 0x0f0f0f0f) << 4 | (lanes >> 4 & 0x0f0f0f0f);
    if (key & 8) lanes = (lanes & 0x00ff00ff) << 8 | (lanes >> 8 & 0x00ff00ff);
    if (key & 16) lanes = lanes << 16 | lanes >> 16;
    const uint32_t position = static_cast<uint32_t>(warp) ^ key / kLanes;
    ready_[position] |= lanes;
    ready_warps_ |= 1u << position;
  }

  uint32_t random() { return xorshift(random_); }

  int any_bit(uint32_t mask) {
    const int shift = static_cast<int>(random() % 32);
    return (std::countr_zero(std::rotr(mask, shift)) + shift) % 32;
  }

  // Takes a thread from those that can go on; there must be one.
  int pick() {
    int warp, lane;
    if (schedule_.order == Order::random) {
      warp = any_bit(ready_warps_);
      lane = any_bit(ready_[warp]);
    } else {
      warp = std::countr_zero(ready_warps_);
      lane = std::countr_zero(ready_[warp]);
      if (schedule_.order == Order::rounds) {  // the first one behind the last position, if there is any
        const int last_warp = position_ / kLanes, last_lane = position_ % kLanes;
        const uint32_t lanes = ready_[last_warp] & ~1u << last_lane, warps = ready_warps_ & ~1u << last_warp;
        if (lanes) {
          warp = last_warp;
          lane = std::countr_zero(lanes);
        } else if (warps) {
          warp = std::countr_zero(warps);
          lane = std::countr_zero(ready_[warp]);
        }
      }
    }
    position_ = warp * kLanes + lane;
    ready_[warp] &= ~(1u << lane);
    if (!ready_[warp]) ready_warps_ &= ~(1u << warp);
    return static_cast<int>(static_cast<uint32_t>(position_) ^ schedule_.key);
  }

  // Lets the thread go on that the schedule says; returns when the calling one's turn comes.
  void next() {
    if (!ready_warps_ && !polling_.empty()) {
      if (!residents.wait(worker_, version_)) fail_of_deadlock();
      if (failed) leave();
      for (const int thread : polling_) make_ready(thread);
      polling_.clear();
    }
    if (!ready_warps_) fail_of_deadlock();
    const int before = current_;
    current_ = pick();
    if (current_ == before) return;
    ++switched_;
    switch_context(fibers_[before].context, fibers_[current_].context);
  }

  [[noreturn, gnu::noinline]] void fail_of_deadlock() {
    std::ostringstream message;
    message << "deadlock in block " << text_of(index_) << ": no thread can go on";
    for (int first = 0, last; first < threads_; first = last + 1) {
      const auto same = [this, first](const Fiber& other) {
        const Fiber& own = fibers_[first];
        return own.ended == other.ended && own.operation == other.operation && same_place(own.where, other.where);
      };
      for (last = first; last + 1 < threads_ && same(fibers_[last + 1]);) ++last;
      message << "; threads " << first << " to " << last;
      if (fibers_[first].ended)
        message << " have ended";
      else
        message << " wait in " << fibers_[first].operation << " at " << place(fibers_[first].where);
    }
    record_error(message.str());
    leave();
  }

  void poison() {
    memset(shared_.begin, kPoison, shared_.bytes);
    if (static_shared_.begin) memset(static_shared_.begin, kPoison, static_shared_.bytes);
    local.runner = this;
  }

  void check_guards() {
    const auto intact = [](const unsigned char* begin, const unsigned char* end) {  // poison, and each byte as the next
      return *begin == kPoison && !memcmp(begin, begin + 1, end - begin - 1);
    };
    const unsigned char* end = shared_.begin + shared_.bytes;
    const std::string block = " of the dynamic shared memory, in block " + text_of(index_);
    if (!intact(memory_.data(), shared_.begin)) record_error("a write before the begin" + block);
    if (!intact(end, memory_.data() + memory_.size())) record_error("a write behind the end" + block);
    if (static_shared_.begin && !intact(std::begin(local.before), std::end(local.before)))
      record_error("a write behind the end of a __shared__ variable, in block " + text_of(index_));
  }

  const int worker_;
  dim3 grid_, block_, index_;
  int threads_ = 0;
  void (*call_)(const void*) = nullptr;
  const void* kernel_ = nullptr;

  std::vector<unsigned char> memory_;  // the dynamic shared memory between its guards
  Range shared_, static_shared_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Context main_;
  int current_ = 0;
  int alive_ = 0, at_barrier_ = 0;
  std::vector<int> polling_;  // threads that wait for a counter
  uint64_t version_ = 0;      // of the counters when the first of them saw its own

  Schedule schedule_;
  uint32_t ready_[kMaxWarps] = {}, ready_warps_ = 0;
  int position_ = 0;
  uint64_t random_ = 1;
  int64_t switched_ = 0;
};

}  // namespace

void collective(const Operation& operation, uint32_t mask, void* argument, Where where) {
  local.runner->collective(operation, mask, argument, where);
}
void block_barrier(Where where) { local.runner->block_barrier(where); }
void fail(const char* text) { local.runner->fail(text); }
void interrupt() { local.runner->interrupt(); }
unsigned take_ticket(unsigned* counter, Where where) { return local.runner->take_ticket(counter, where); }
void add_to_counter(unsigned* counter, Where where) { local.runner->add_to_counter(counter, where); }
void wait_for_counter(const unsigned* counter, unsigned least, Where where) {
  local.runner->wait_for_counter(counter, least, where);
}
void copy_async(void* shared, const void* global, bool valid, Where where) {
  local.runner->copy_async(shared, global, valid, where);
}
void commit_copies() { ++local.runner->fiber().group; }
void wait_for_copies(int pending, Where where) { local.runner->wait_for_copies(pending, where); }
void check_shared_row(const char* name, const void* p, Where where) { local.runner->check_shared_row(name, p, where); }
const dim3& thread_index() { return local.runner->fiber().index; }
const dim3& block_index() { return local.runner->index(); }
const dim3& block_size() { return local.runner->block(); }
const dim3& grid_size() { return local.runner->grid(); }
unsigned char* dynamic_shared() { return local.runner->shared(); }

cudaError_t launch(dim3 grid, int block, int shared_bytes, void (*call)(const void*), const void* kernel) {
  static std::vector<std::unique_ptr<Runner>> runners;
  if (failed) return cudaErrorLaunchFailure;
  const bool fits = grid.x - 1u < 0x7fffffffu && grid.y - 1u < 65535u && grid.z - 1u < 65535u && block >= 1 &&
                    block <= kMaxThreads && shared_bytes >= 0 && shared_bytes <= settings.shared_limit;
  if (!fits) {
    record_error("a launch that no GPU takes: grid " + text_of(grid) + ", block " + std::to_string(block) + ", " +
                 std::to_string(shared_bytes) + " bytes of shared memory, of which there are " +
                 std::to_string(settings.shared_limit));
    return cudaErrorInvalidConfiguration;
  }
  largest_shared = std::max(largest_shared, shared_bytes);
  const Schedule schedule = numbered_schedule(settings.number);
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> started{0};
  const auto work = [&](int worker) {
    Runner& runner = *runners[worker];
    runner.begin(grid, block, shared_bytes, call, kernel);
    residents.enter(worker);
    for (uint64_t i; !failed && (i = started++) < count;) {
      // Forwards, backwards, or each block once with a stride that has no factor in common with their number.
      uint64_t b = i;
      if (schedule.seed)
        b = (i * 2654435761 + schedule.seed % count) % count;
      else if (schedule.key)
        b = count - 1 - i;
      runner.run(dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y), schedule.seed + b, schedule);
    }
    residents.leave(worker);
  };
  const bool in_turns = settings.resident > 0;
  const size_t workers = std::min<uint64_t>(in_turns ? settings.resident : settings.os_threads, count);
  residents.begin(static_cast<int>(workers), in_turns, schedule);
  while (runners.size() < workers) runners.push_back(std::make_unique<Runner>(static_cast<int>(runners.size())));
  std::vector<std::thread> others;
  for (size_t i = 1; i < workers; ++i) others.emplace_back([&, i] { work(static_cast<int>(i)); });
  work(0);
  for (std::thread& other : others) other.join();
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator

// For the tests, one call at a time: how launches run from now on; forgets the error.
extern "C" void emulator_set(int schedule, int os_threads, int shared_limit, int resident) {
  emulator::settings = {schedule, std::max(1, os_threads), shared_limit, resident};
  emulator::first_error.clear();
  emulator::failed = false;
  emulator::switches = 0;
  emulator::largest_shared = 0;
}
// The first error since then, or an empty text.
extern "C" const char* emulator_error() { return emulator::first_error.c_str(); }
// How often a fiber has gone on since then.
extern "C" int64_t emulator_switches() { return emulator::switches; }
// The most bytes of dynamic shared memory that a block of a launch has had since then.
extern "C" int emulator_largest_shared() { return emulator::largest_shared; }
