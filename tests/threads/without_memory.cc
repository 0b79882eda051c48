// A part of the shared work has no memory, in the caller or in a helper: the caller gets
// the exception, and only after all parts that have begun are done.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <new>
#include <thread>

#include "team.h"

int main(int argc, char**) {
  const bool in_caller = argc > 1;
  const std::thread::id caller = std::this_thread::get_id();
  const auto wait = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  thread_limit = 4;
  xla::ffi::ThreadPool pool;
  Team team(pool, 1e12);
  for (int i = 0; i < 100; i++) team.run(8, [&](int) { std::this_thread::yield(); });
  std::atomic<int> helping{0}, done{0};
  bool caught = false;
  try {
    team.run(8, [&](int) {
      const bool is_caller = std::this_thread::get_id() == caller;
      if (!is_caller) helping++;
      while (is_caller && helping == 0) wait();
      if (is_caller == in_caller) throw std::bad_alloc();
      wait();
      done++;
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  const int before = done;
  wait();
  wait();
  std::printf("%d %d\n", caught, before == done);
}
