// Sharing out a kernel's work among the threads of this process.
#pragma once
#include <cstdint>

namespace euryale {

// Calls run(body, index) once for every index in [0, count) and returns when all calls have ended. The calling thread
// takes part, and does everything that up to `threads` - 1 helpers do not get to; who runs an index is left open.
void share_out(int64_t threads, int64_t count, void (*run)(const void* body, int64_t index), const void* body);

// Cores that this process may use.
int64_t usable_cores();

template <class Body>
void parallel_for(int64_t threads, int64_t count, const Body& body) {
    if (threads > 1 && count > 1)
        share_out(threads, count, [](const void* of, int64_t index) { (*(const Body*)of)(index); }, &body);
    else
        for (int64_t index = 0; index < count; ++index) body(index);
}

}  // namespace euryale
