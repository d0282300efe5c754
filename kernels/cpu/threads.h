// Divides a kernel's work among the threads of this process.
#pragma once
#include <cstdint>

namespace euryale {

// Calls run(body, index) once for every index in [0, count) and returns when all calls have ended. Up to `threads` - 1
// helpers take part. The calling thread runs every index that no helper has claimed. Which thread runs an index is
// unspecified.
void run_parallel(int64_t threads, int64_t count, void (*run)(const void* body, int64_t index), const void* body);

// Cores that this process may use.
int64_t usable_cores();

template <class Body>
void parallel_for(int64_t threads, int64_t count, const Body& body) {
    if (threads > 1 && count > 1)
        run_parallel(threads, count, [](const void* of, int64_t index) { (*(const Body*)of)(index); }, &body);
    else
        for (int64_t index = 0; index < count; ++index) body(index);
}

}  // namespace euryale
