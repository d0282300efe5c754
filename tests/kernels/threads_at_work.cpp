// Work divided among threads, for the thread sanitizer: every index runs once and what it wrote is seen afterwards.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../kernels/cpu/threads.h"

constexpr int64_t ROUNDS = 1000;

void expect(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "wrong: %s\n", what);
        std::exit(1);
    }
}

// Jobs of all sizes, one after the other, some of them after a pause in which helpers fall asleep. `runs` is not atomic:
// two threads at one index, or a caller that does not wait, are a race.
void caller(int64_t number) {
    for (int64_t i = 0; i < ROUNDS; ++i) {
        const int64_t threads = 1 + (i + number) % 5, count = i * 7 % 50;
        std::vector<int64_t> runs(count, 0);
        euryale::parallel_for(threads, count, [&](int64_t index) { runs[index] += i + index; });
        for (int64_t index = 0; index < count; ++index) expect(runs[index] == i + index, "each index runs once");
        if (i % 100 == 99) usleep(5000);
    }
}

int main() {
    caller(0);
    std::thread other(caller, 1);  // two callers at once: one of them works alone
    caller(2);
    other.join();
    std::puts("done");
}
