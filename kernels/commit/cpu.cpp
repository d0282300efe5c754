// The copy of accepted rows into the KV pages on a CPU.
#include <cstring>

#include "../cpu/operations.h"

// Copies rows of `scratch` [layers, 2, scratch_rows, heads, dim] whose slot is not negative to `cache` [layers, 2,
// pages, heads, page, dim]. `size`: bytes of one head's row.
extern "C" void euryale_commit(int64_t layers, int64_t pages, int64_t heads, int64_t page, int64_t scratch_rows,
                               int64_t size, char* cache, const char* scratch, int64_t rows, const int64_t* slots) {
    for (int64_t plane = 0; plane < 2 * layers; ++plane) {
        char* to = cache + plane * pages * heads * page * size;
        const char* from = scratch + plane * scratch_rows * heads * size;
        for (int64_t row = 0; row < rows; ++row) {
            if (slots[row] < 0) continue;
            for (int64_t h = 0; h < heads; ++h)
                std::memcpy(to + ((slots[row] / page * heads + h) * page + slots[row] % page) * size,
                            from + (row * heads + h) * size, size);
        }
    }
}
