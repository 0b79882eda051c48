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

#include "tiles.h"
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
  Team(xla::ffi::ThreadPool& pool, double flops) : counted_(true) {
    constexpr double kWorthwhile = 4e6;  // About 40 microseconds; waking a thread takes 10.
    const int running = ++threads_running;
    const int free = static_cast<int>(std::min<int64_t>(pool.num_threads(), thread_limit - running));
    const int helpers = static_cast<int>(std::min<double>(free, flops / kWorthwhile - 1));
    if (helpers <= 0) return;
    shared_ = std::make_shared<Shared>(1 + helpers);
    for (int slot = 1; slot <= helpers; slot++) pool.Schedule([shared = shared_, slot] { help(*shared, slot); });
  }

  ~Team() {
    if (shared_) shared_->closed.store(true, std::memory_order_release);
    if (counted_) --threads_running;
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Threads that may take part, for the choice of the number of parts.
  int size() const { return shared_ ? static_cast<int>(shared_->slots.size()) : 1; }

  // Calls work(0), ..., work(count - 1) in any order, and returns when all are done.
  // Throws std::bad_alloc then if one of them did.
  template <typename Work>
  void run(int count, const Work& work) {
    if (!shared_ || count == 1) {
      for (int i = 0; i < count; i++) work(i);
      return;
    }
    for (int first = 0; first < count; first += kMostParts) {
      share(std::min(kMostParts, count - first), [&](int i) { work(first + i); });
    }
  }

 private:
  // Parts that a ticket can number.
  static constexpr int kMostParts = 0xfffff;

  // Shares the parts among the threads.
  template <typename Work>
  void share(int count, const Work& work) {
    Shared& shared = *shared_;
    shared.work.store(&work, std::memory_order_relaxed);
    shared.call.store(
        [](const void* work, int i) { (*static_cast<const Work*>(work))(i); }, std::memory_order_relaxed);
    shared.unfinished.store(count, std::memory_order_relaxed);
    phase_++;
    for (int slot = 0; slot < size(); slot++) {
      const uint64_t begin = int64_t{slot} * count / size(), end = int64_t{slot + 1} * count / size();
      shared.slots[slot].ticket.store(phase_ << 40 | end << 20 | begin, std::memory_order_release);
    }
    while (do_part(shared, 0)) continue;
    for (int spins = 0; shared.unfinished.load(std::memory_order_acquire) > 0; spins++) pause(spins);
    if (shared.failed.exchange(false)) throw std::bad_alloc();
  }

  // A thread's own range of the parts, so that it finds its rows in its cache again: the
  // number of the run, the end and the next part in 24, 20 and 20 bits. Taking a part is
  // one exchange of all three, which fails if the run has ended meanwhile.
  struct alignas(64) Slot {
    std::atomic<uint64_t> ticket{0};
  };

  struct Shared {
    explicit Shared(int threads) : slots(threads), caller(std::this_thread::get_id()) {}

    std::vector<Slot> slots;
    const std::thread::id caller;
    std::atomic<const void*> work{nullptr};
    std::atomic<void (*)(const void*, int)> call{nullptr};
    std::atomic<int> unfinished{0};
    std::atomic<bool> failed{false};  // A part had no memory.
    std::atomic<bool> closed{false};
  };

  // Does one part of the current run: of a thread's own, or else of another one's.
  static bool do_part(Shared& shared, size_t own) {
    for (size_t i = 0; i < shared.slots.size(); i++) {
      std::atomic<uint64_t>& slot = shared.slots[(own + i) % shared.slots.size()].ticket;
      uint64_t ticket = slot.load(std::memory_order_acquire);
      while ((ticket & 0xfffff) < (ticket >> 20 & 0xfffff)) {
        const void* const work = shared.work.load(std::memory_order_relaxed);
        const auto call = shared.call.load(std::memory_order_relaxed);
        if (!slot.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        try {
          call(work, static_cast<int>(ticket & 0xfffff));
        } catch (const std::bad_alloc&) {
          // A helper has no one to catch it, and the caller must wait for the others.
          shared.failed.store(true, std::memory_order_relaxed);
        }
        shared.unfinished.fetch_sub(1, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  static void help(Shared& shared, size_t slot) {
    // Without a pool, XLA would run this in the caller, which would wait for itself.
    if (std::this_thread::get_id() == shared.caller) return;
    ++threads_running;
    const TileRegisters registers;
    for (int spins = 0; !shared.closed.load(std::memory_order_acquire);) {
      if (leave_if_crowded()) return;
      spins = do_part(shared, slot) ? 0 : spins + 1;
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

  // Returns the next `count` numbers of 4 bytes, each part from a multiple of 64 bytes.
  template <typename Number = float>
  Number* next(size_t count) {
    static_assert(sizeof(Number) == sizeof(float));
    float* const start = block_.data + used_;
    used_ += padded(count);
    return reinterpret_cast<Number*>(start);
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
