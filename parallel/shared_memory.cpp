// Collectives among the ranks of one host over one shared mapping.
//
// Every rank has a flag, a counter that only it raises, and two buffers that it alone writes. In a phase a rank writes
// its buffer, raises its flag, and waits until the flags it needs have caught up. Buffers alternate between operations:
// one may be written again as soon as every rank has begun the operation before, since then all have ended the one
// before that. Sums are taken in float32 in the order of the ranks, so that all get the same bits.
//
// A waiting rank spins, then yields, then sleeps; a sleeper wakes now and then to see whether the others live. Each
// holds a lock on a byte of the file for as long as its process exists, which the kernel lets go whatever ends it.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/wait.h"
#include "collectives.h"

namespace {

constexpr int64_t ONE_SHOT = 16 << 10;  // bytes up to which every rank sums everything
constexpr int64_t SPIN = 50'000, SLEEP = 50'000'000;  // nanoseconds
constexpr int YIELDS = 300;
constexpr int OK = 0, TIMED_OUT = -1, CLOSED = -2;  // other results: 1 + the rank that died

using euryale::now;
using Flag = euryale::Signal;
static_assert(sizeof(Flag) == 64 && std::atomic<uint32_t>::is_always_lock_free, "layout of the shared memory");

}  // namespace

struct EuryaleGroup {
    int fd;  // -1: ranks are threads of one process, which die together
    int64_t rank, size, capacity, timeout;
    int64_t spin;             // nanoseconds
    char* memory;
    uint32_t phase = 0;       // phases begun; every rank counts alike
    uint32_t begun = 0;       // the phase in which the operation before this one began
    int64_t operation = 0;
    int64_t deadline = 0;     // of the call under way; 0: its clock has not been read yet

    Flag& flag(int64_t r) const { return ((Flag*)memory)[r]; }
    char* buffer(int64_t r) const {
        return memory + size * sizeof(Flag) + (2 * r + operation % 2) * capacity;
    }

    bool is_dead(int64_t r) const {
        if (fd < 0) return false;
        struct flock lock = {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = r;
        lock.l_len = 1;
        return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    }

    void raise() {
        flag(rank).value.store(++phase, std::memory_order_seq_cst);
        flag(rank).wake();
    }

    static bool reached(uint32_t value, uint32_t wanted) { return (int32_t)(value - wanted) >= 0; }

    int wait(int64_t r, uint32_t wanted) {
        Flag& f = flag(r);
        const auto is_there = [&](uint32_t value) { return reached(value, wanted); };
        const auto is_ready = [&] { return is_there(f.value.load(std::memory_order_acquire)); };
        if (euryale::poll(spin, YIELDS, is_ready)) return OK;
        if (!deadline) deadline = now() + timeout;
        for (bool was_dead = false;;) {
            f.sleep(SLEEP, is_there);
            if (is_ready()) return OK;
            if (was_dead) return 1 + (int)r;  // looked at its flag once more after seeing it dead
            was_dead = is_dead(r);
            if (now() > deadline) return TIMED_OUT;
        }
    }

    int wait_all(uint32_t wanted) {
        for (int64_t r = 0; r < size; ++r)
            if (r != rank)
                if (const int problem = wait(r, wanted)) return problem;
        return OK;
    }

    // To be called before the buffer is written.
    int begin() {
        if (const int problem = wait_all(begun)) return problem;
        begun = phase + 1;
        ++operation;
        return OK;
    }

    int meet() {
        raise();
        return wait_all(phase);
    }

    int reduce_small(int64_t is_bfloat16, int64_t count, char* data) {
        if (const int problem = begin()) return problem;
        std::memcpy(buffer(rank), data, count * (is_bfloat16 ? 2 : 4));
        if (const int problem = meet()) return problem;
        std::vector<const void*> inputs(size);
        for (int64_t r = 0; r < size; ++r) inputs[r] = buffer(r);
        euryale::kernels()->reduce(is_bfloat16, count, size, inputs.data(), data);
        return OK;
    }

    // Every rank sums one slice, in place of its own contribution, and all collect the slices.
    int reduce_large(int64_t is_bfloat16, int64_t count, char* data) {
        const int64_t item = is_bfloat16 ? 2 : 4, slice = ((count + size - 1) / size + 15) / 16 * 16;
        if (const int problem = begin()) return problem;
        std::memcpy(buffer(rank), data, count * item);
        if (const int problem = meet()) return problem;
        const auto start = [&](int64_t r) { return std::min(r * slice, count); };
        std::vector<const void*> inputs(size);
        for (int64_t r = 0; r < size; ++r) inputs[r] = buffer(r) + start(rank) * item;
        euryale::kernels()->reduce(is_bfloat16, start(rank + 1) - start(rank), size, inputs.data(),
                                   buffer(rank) + start(rank) * item);
        if (const int problem = meet()) return problem;
        for (int64_t r = 0; r < size; ++r)
            std::memcpy(data + start(r) * item, buffer(r) + start(r) * item, (start(r + 1) - start(r)) * item);
        return OK;
    }

    int all_reduce(int64_t is_bfloat16, int64_t count, char* data) {
        const int64_t item = is_bfloat16 ? 2 : 4, whole = capacity / item;
        if (count * item <= ONE_SHOT) return reduce_small(is_bfloat16, count, data);
        for (int64_t first = 0; first < count; first += whole)
            if (const int problem =
                    reduce_large(is_bfloat16, std::min(whole, count - first), data + first * item))
                return problem;
        return OK;
    }

    int all_gather(int64_t bytes, const char* data, char* out) {
        for (int64_t first = 0; first < bytes; first += capacity) {
            const int64_t n = std::min(capacity, bytes - first);
            if (const int problem = begin()) return problem;
            std::memcpy(buffer(rank), data + first, n);
            if (const int problem = meet()) return problem;
            for (int64_t r = 0; r < size; ++r) std::memcpy(out + r * bytes + first, buffer(r), n);
        }
        return OK;
    }

    int broadcast(int64_t root, int64_t bytes, char* data) {
        for (int64_t first = 0; first < bytes; first += capacity) {
            const int64_t n = std::min(capacity, bytes - first);
            if (const int problem = begin()) return problem;
            if (rank == root) std::memcpy(buffer(rank), data + first, n);
            raise();
            if (rank == root) continue;
            if (const int problem = wait(root, phase)) return problem;
            std::memcpy(data + first, buffer(root), n);
        }
        return OK;
    }
};

extern "C" {

// Bytes of a group's mapping.
int64_t euryale_shared_bytes(int64_t size, int64_t capacity) { return size * (sizeof(Flag) + 2 * capacity); }

// Maps `fd`, which is zero at the start, and holds this rank's lock; null if that fails. If `fd` is negative, `memory`
// is the mapping.
EuryaleGroup* euryale_shared_attach(int fd, void* memory, int64_t rank, int64_t size, int64_t capacity,
                                    int64_t timeout_ns, int64_t may_spin) {
    if (fd >= 0) {
        struct flock lock = {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = rank;
        lock.l_len = 1;
        if (fcntl(fd, F_OFD_SETLK, &lock)) return nullptr;
        memory = mmap(nullptr, euryale_shared_bytes(size, capacity), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED) return nullptr;
    }
    return new EuryaleGroup{fd, rank, size, capacity, timeout_ns, may_spin ? SPIN : 0, (char*)memory};
}

void euryale_shared_detach(EuryaleGroup* group) {
    if (group->fd >= 0) {
        munmap(group->memory, euryale_shared_bytes(group->size, group->capacity));
        close(group->fd);
    }
    delete group;
}

int euryale_shared_all_reduce(EuryaleGroup* group, int64_t is_bfloat16, int64_t count, void* data) {
    if (!group) return CLOSED;
    group->deadline = 0;
    return group->all_reduce(is_bfloat16, count, (char*)data);
}

// `partial_sum` becomes the sum over the ranks plus the residual, `normed` its RMSNorm.
int euryale_shared_all_reduce_add_rms_norm(EuryaleGroup* group, int64_t is_bfloat16, int64_t rows, int64_t width,
                                           void* partial_sum, const void* residual, const void* weight, float eps,
                                           void* normed) {
    if (!group) return CLOSED;
    group->deadline = 0;
    if (const int problem = group->all_reduce(is_bfloat16, rows * width, (char*)partial_sum)) return problem;
    euryale::kernels()->add_rms_norm(is_bfloat16, rows, width, partial_sum, residual, weight, eps, normed,
                                      partial_sum);
    return OK;
}

int euryale_shared_all_gather(EuryaleGroup* group, int64_t bytes, const void* data, void* out) {
    if (!group) return CLOSED;
    group->deadline = 0;
    return group->all_gather(bytes, (const char*)data, (char*)out);
}

int euryale_shared_broadcast(EuryaleGroup* group, int64_t root, int64_t bytes, void* data) {
    if (!group) return CLOSED;
    group->deadline = 0;
    return group->broadcast(root, bytes, (char*)data);
}

}  // extern "C"
