// Recorded calls, run again one after the other: what a CUDA graph does for a GPU's launches.
#include <chrono>

#include "operations.h"

namespace {

int call(const int64_t* words) { return ((int (*)(const int64_t*))words[0])(words + 2); }

}  // namespace

extern "C" {

// `words`: for every call the `replay` of its table entry, the number of its arguments, and the arguments, floats as
// their bits. Stops at the first call that does not return 0 and returns its status.
int euryale_replay(const int64_t* words, int64_t count) {
    for (const int64_t* end = words + count; words < end; words += 2 + words[1])
        if (const int status = call(words)) return status;
    return 0;
}

// The same; writes the nanoseconds of each call to `nanoseconds` [calls].
int euryale_replay_timed(const int64_t* words, int64_t count, int64_t* nanoseconds) {
    for (const int64_t* end = words + count; words < end; words += 2 + words[1]) {
        const auto started = std::chrono::steady_clock::now();
        if (const int status = call(words)) return status;
        *nanoseconds++ = (std::chrono::steady_clock::now() - started).count();
    }
    return 0;
}

}  // extern "C"
