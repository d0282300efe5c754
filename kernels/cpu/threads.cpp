// The thread pool among which kernels divide their work.
//
// Every thread has a part of the indices and a counter of the unclaimed ones. A thread claims from its own part first,
// so that it reads the same weights in every step, then from the other parts. So no thread waits for one that does not
// run, except for the one index that such a thread may have claimed.
//
// A claim is one atomic decrement. A thread reads the job only after a claim: the job cannot change before the claimed
// index is done. So a helper that comes late, even during the next job, claims an index of the current job.
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <mutex>
#include <system_error>
#include <thread>

#include "wait.h"

namespace euryale {
namespace {

constexpr int64_t MAX_THREADS = 1024;
constexpr int64_t SPIN = 50'000, LONG = 3'600'000'000'000;  // nanoseconds
// A helper yields for longer than the host of a small model needs between two steps.
constexpr int HELPER_YIELDS = 8000, CALLER_YIELDS = 50;

struct alignas(64) Part {
    std::atomic<int64_t> unclaimed{0};  // below 0 if several threads came too late
};

class Threads {
public:
    void run_parallel(int64_t threads, int64_t count, void (*run)(const void*, int64_t), const void* body) {
        const std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (!lock) {  // another thread's job is under way
            for (int64_t index = 0; index < count; ++index) run(body, index);
            return;
        }
        threads = std::min({threads, count, MAX_THREADS});
        start_helpers(threads - 1);
        run_ = run, body_ = body, count_ = count, threads_ = threads;
        undone_.value.store((uint32_t)count, std::memory_order_relaxed);
        num_parts_.store(threads, std::memory_order_relaxed);
        for (int64_t t = 0; t < threads; ++t)
            parts_[t].unclaimed.store(begin_of(t + 1) - begin_of(t), std::memory_order_release);
        jobs_.value.fetch_add(1, std::memory_order_seq_cst);
        jobs_.wake((int)threads - 1);
        work(0);
        const auto is_done = [&] { return !undone_.value.load(std::memory_order_acquire); };
        if (poll(SPIN, CALLER_YIELDS, is_done)) return;
        while (!is_done()) undone_.sleep(LONG, [](uint32_t undone) { return !undone; });
    }

private:
    int64_t begin_of(int64_t t) const { return t * count_ / threads_; }

    void start_helpers(int64_t wanted) {
        while (num_helpers_ < wanted) {
            sigset_t all, before;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the process's own threads
            try {
                std::thread(&Threads::help, this, num_helpers_ + 1).detach();
                ++num_helpers_;
            } catch (const std::system_error&) {  // no more threads can be started: the others do all
                wanted = num_helpers_;
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
    }

    void help(int64_t number) {
        for (uint32_t seen = 0;;) {
            const auto is_new = [&](uint32_t jobs) { return jobs != seen; };
            if (!poll(SPIN, HELPER_YIELDS, [&] { return is_new(jobs_.value.load(std::memory_order_acquire)); }))
                jobs_.sleep(LONG, is_new);
            seen = jobs_.value.load(std::memory_order_acquire);
            work(number);
        }
    }

    // Runs all indices that it can claim, beginning with part `number`.
    void work(int64_t number) {
        uint32_t done = 0;
        const int64_t parts = num_parts_.load(std::memory_order_relaxed);
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t t = (number + i) % parts;
            std::atomic<int64_t>& unclaimed = parts_[t].unclaimed;
            while (unclaimed.load(std::memory_order_relaxed) > 0) {
                const int64_t left = unclaimed.fetch_sub(1, std::memory_order_acquire);
                if (left <= 0) break;
                run_(body_, begin_of(t + 1) - left);
                ++done;
            }
        }
        if (done && undone_.value.fetch_sub(done, std::memory_order_seq_cst) == done) undone_.wake();
    }

    std::mutex busy_;  // held by the thread whose job is run
    int64_t num_helpers_ = 0;
    // The job: written by the holder of the lock, before any index can be claimed.
    void (*run_)(const void*, int64_t) = nullptr;
    const void* body_ = nullptr;
    int64_t count_ = 0, threads_ = 1;
    std::atomic<int64_t> num_parts_{0};
    Signal jobs_{}, undone_{};  // jobs begun; indices of this job that are not done
    Part parts_[MAX_THREADS];
};

}  // namespace

int64_t usable_cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

void run_parallel(int64_t threads, int64_t count, void (*run)(const void* body, int64_t index), const void* body) {
    static Threads& all = *new Threads;  // never destroyed: its helpers run until the process ends
    all.run_parallel(threads, count, run, body);
}

}  // namespace euryale
