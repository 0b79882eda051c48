// Threads that share the work of one call, and memory that calls reuse.
//
// The threads are those of XLA's own pool, so that nothing is created and no two pools
// compete. A helper may come late or never: the caller works too, and waits only for
// parts that a helper has begun. Which thread does a part never changes the result.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

// Threads that all calls of the process may use together.
inline std::atomic<int> thread_limit{1};
// Threads that are in a call now. Several devices may run windows at once.
inline std::atomic<int> threads_running{0};

class Team {
 public:
  // Makes a team of the caller alone.
  Team() = default;

  // Asks the pool for as many helpers as are free and the work is worth.
  Team(xla::ffi::ThreadPool& pool, double flops) {
    constexpr double kWorthwhile = 4e6;  // About 40 microseconds; waking a thread takes 10.
    const int running = ++threads_running;
    counted_ = true;
    const int free = std::min<int64_t>(pool.num_threads(), thread_limit - running);
    const int helpers = static_cast<int>(std::min<double>(free, flops / kWorthwhile - 1));
    if (helpers <= 0) return;
    shared_ = std::make_shared<Shared>();
    shared_->caller = std::this_thread::get_id();
    size_ = 1 + helpers;
    for (int i = 0; i < helpers; i++) pool.Schedule([shared = shared_] { help(*shared); });
  }

  ~Team() {
    if (shared_) shared_->ticket.store(kClosed, std::memory_order_release);
    if (counted_) --threads_running;
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Threads that may take part, for the choice of the number of parts.
  int size() const { return size_; }

  // Calls work(0), ..., work(count - 1) in any order, and returns when all are done.
  template <typename Work>
  void run(int count, const Work& work) {
    if (!shared_ || count == 1) {
      for (int i = 0; i < count; i++) work(i);
      return;
    }
    Shared& shared = *shared_;
    shared.work.store(&work, std::memory_order_relaxed);
    shared.call.store(
        [](const void* work, int i) { (*static_cast<const Work*>(work))(i); }, std::memory_order_relaxed);
    shared.count.store(count, std::memory_order_relaxed);
    shared.unfinished.store(count, std::memory_order_relaxed);
    shared.ticket.store(++phase_ << 32, std::memory_order_release);
    while (do_part(shared)) continue;
    for (int spins = 0; shared.unfinished.load(std::memory_order_acquire) > 0; spins++) pause(spins);
  }

 private:
  static constexpr uint64_t kClosed = ~uint64_t{0};

  struct Shared {
    // The number of the run in the upper half, the next part in the lower one. Taking a
    // part is one exchange of both, which fails if the run has ended meanwhile.
    std::atomic<uint64_t> ticket{kIdle};
    std::atomic<const void*> work{nullptr};
    std::atomic<void (*)(const void*, int)> call{nullptr};
    std::atomic<int> count{0};
    std::atomic<int> unfinished{0};
    std::thread::id caller;
  };

  static constexpr uint64_t kIdle = 0;

  // Does one part of the current run, if there is one left.
  static bool do_part(Shared& shared) {
    uint64_t ticket = shared.ticket.load(std::memory_order_acquire);
    while (ticket != kClosed && ticket >> 32 != 0) {
      const int part = static_cast<int>(ticket & 0xffffffff);
      if (part >= shared.count.load(std::memory_order_relaxed)) return false;
      const void* work = shared.work.load(std::memory_order_relaxed);
      const auto call = shared.call.load(std::memory_order_relaxed);
      if (!shared.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      call(work, part);
      shared.unfinished.fetch_sub(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  static void help(Shared& shared) {
    // Without a pool, XLA would run this in the caller, which would wait for itself.
    if (std::this_thread::get_id() == shared.caller) return;
    ++threads_running;
    for (int spins = 0; shared.ticket.load(std::memory_order_acquire) != kClosed;) {
      if (leave_if_crowded()) return;
      spins = do_part(shared) ? 0 : spins + 1;
      pause(spins);
    }
    --threads_running;
  }

  // Stops counting this thread if more threads run than may.
  static bool leave_if_crowded() {
    int running = threads_running.load(std::memory_order_relaxed);
    while (running > thread_limit.load(std::memory_order_relaxed)) {
      if (threads_running.compare_exchange_weak(running, running - 1)) return true;
    }
    return false;
  }

  static void pause(int spins) {
    if (spins > 2000) std::this_thread::yield();
  }

  std::shared_ptr<Shared> shared_;
  uint64_t phase_ = 0;
  int size_ = 1;
  bool counted_ = false;
};

// Memory of a call, aligned to 64 bytes. Fresh memory costs a page fault every 4 KiB, which
// was measured as several percent of a window, so the process keeps its blocks.
class Scratch {
 public:
  explicit Scratch(size_t count) : block_(take(count)) {}
  ~Scratch() {
    const std::lock_guard<std::mutex> lock(mutex());
    kept().push_back(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Returns the next `count` floats of the block.
  float* next(size_t count) {
    float* const start = block_.data + used_;
    used_ += padded(count);
    return start;
  }

  static size_t padded(size_t count) { return (count + 15) / 16 * 16; }

 private:
  struct Block {
    float* data = nullptr;
    size_t count = 0;
  };

  static std::mutex& mutex() {
    static std::mutex* const mutex = new std::mutex;  // Threads may outlive static objects.
    return *mutex;
  }

  static std::vector<Block>& kept() {
    static std::vector<Block>* const kept = new std::vector<Block>;
    return *kept;
  }

  static Block take(size_t count) {
    Block block;
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (!kept().empty()) {
        block = kept().back();
        kept().pop_back();
      }
    }
    if (block.count >= count) return block;
    std::free(block.data);
    block.data = static_cast<float*>(std::aligned_alloc(64, 4 * padded(count)));
    block.count = count;
    if (!block.data) throw std::bad_alloc();
    return block;
  }

  Block block_;
  size_t used_ = 0;
};
