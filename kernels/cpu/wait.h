// How threads and ranks wait for one another: they spin briefly, then yield their core to others, then sleep.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <ctime>

namespace euryale {

// Monotonic clock in nanoseconds.
inline int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

inline void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

// Returns whether ready() became true: spins for up to `spin` nanoseconds, then yields up to `yields` times. (A yield
// takes about 0.25 us on an idle core.)
template <class Ready>
bool poll(int64_t spin, int yields, Ready ready) {
    constexpr int OFTEN = 16;  // calls of ready() between two clock reads
    if (ready()) return true;
    for (const int64_t end = spin ? now() + spin : 0; spin && now() < end;)
        for (int i = 0; i < OFTEN; ++i, relax())
            if (ready()) return true;
    for (; yields; --yields) {
        sched_yield();
        if (ready()) return true;
    }
    return false;
}

// A 32-bit number whose changes can be waited for, by threads of one process or, where it lies in shared memory, of
// several.
struct alignas(64) Signal {
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> num_sleepers;

    // To be called after a change of `value` that is sequentially consistent.
    void wake(int most = INT32_MAX) {
        if (num_sleepers.load(std::memory_order_seq_cst))
            syscall(SYS_futex, &value, FUTEX_WAKE, most, nullptr, nullptr, 0);
    }

    // Sleeps until somebody calls `wake`, at most `limit` nanoseconds, unless `ready(value)` holds already.
    template <class Ready>
    void sleep(int64_t limit, Ready ready) {
        num_sleepers.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t seen = value.load(std::memory_order_seq_cst);
        if (!ready(seen)) {
            const timespec nap = {(time_t)(limit / 1'000'000'000), (long)(limit % 1'000'000'000)};
            syscall(SYS_futex, &value, FUTEX_WAIT, seen, &nap, nullptr, 0);
        }
        num_sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
};

}  // namespace euryale
