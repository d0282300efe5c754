// Collectives with threads as ranks over one mapping, for the thread sanitizer, which sees no other processes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../parallel/collectives.h"

constexpr int64_t SIZE = 4, CAPACITY = 1 << 16, ROUNDS = 300;

void expect(bool holds, const char* what) {
    if (!holds) {
        std::fprintf(stderr, "wrong: %s\n", what);
        std::exit(1);
    }
}

void rank_main(char* memory, int64_t rank) {
    EuryaleGroup* group = euryale_shared_attach(-1, memory, rank, SIZE, CAPACITY, 60'000'000'000, rank % 2);
    for (int64_t i = 0; i < ROUNDS; ++i) {
        for (int64_t count : {1, 1000, 5000, 40000}) {  // one-shot, two-shot, several pieces
            std::vector<float> x(count, float(i + rank));
            expect(!euryale_shared_all_reduce(group, 0, count, x.data()), "status of a sum");
            expect(x[0] == 4 * i + 6 && x[count - 1] == 4 * i + 6, "sum");
        }
        int64_t mine = 10 * i + rank, all[SIZE];
        expect(!euryale_shared_all_gather(group, sizeof mine, &mine, all), "status of a gather");
        for (int64_t r = 0; r < SIZE; ++r) expect(all[r] == 10 * i + r, "gather");
        for (int64_t j = 0; j < 3; ++j) {  // the root may run ahead of the others
            int64_t sent = rank ? -1 : i * 3 + j;
            expect(!euryale_shared_broadcast(group, 0, sizeof sent, &sent), "status of a broadcast");
            expect(sent == i * 3 + j, "broadcast");
        }
    }
    euryale_shared_detach(group);
}

int main() {
    void* memory = std::aligned_alloc(64, euryale_shared_bytes(SIZE, CAPACITY));
    std::fill((char*)memory, (char*)memory + euryale_shared_bytes(SIZE, CAPACITY), 0);
    std::vector<std::thread> ranks;
    for (int64_t rank = 0; rank < SIZE; ++rank) ranks.emplace_back(rank_main, (char*)memory, rank);
    for (std::thread& rank : ranks) rank.join();
    std::free(memory);
    std::puts("done");
}
