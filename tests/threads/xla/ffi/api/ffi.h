// A pool of threads in place of XLA's, for programs that have no XLA.

#pragma once

#include <cstdint>
#include <thread>

namespace xla::ffi {

struct ThreadPool {
  int64_t num_threads() const { return 4; }

  template <typename Work>
  void Schedule(Work work) {
    std::thread(work).detach();
  }
};

}  // namespace xla::ffi
