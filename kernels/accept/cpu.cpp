// The accepted path in every draft tree on a CPU.
#include <algorithm>

#include "../cpu/operations.h"

// See kernels/accept/__init__.py. `good` and `scores` may be null.
extern "C" void euryale_accept(const euryale::Step* step, const int64_t* parent_rows, const int64_t* depths,
                               const int64_t* slots, const int32_t* tokens, const int32_t* next_tokens,
                               const int8_t* good, const float* scores, int32_t* last_rows, int64_t* commit_slots) {
    for (int64_t i = 0; i < step->num_segments; ++i) {
        const int64_t begin = step->starts[i], end = step->starts[i + 1];
        const int64_t root = begin + step->num_new_tokens[i] - 1;
        int64_t best = root;
        // During the walk, commit_slots is 1 where a row is reached and 0 elsewhere.
        for (int64_t row = begin; row < end; ++row) {
            const int64_t parent = parent_rows[row];
            commit_slots[row] = 1;
            if (parent < 0) continue;
            const bool fits = good && good[row] >= 0 ? good[row] : tokens[row] == next_tokens[parent];
            commit_slots[row] = fits && commit_slots[parent];  // parents come before their children
            const bool is_likelier = scores && scores[row] > scores[best];
            const bool is_better = depths[row] > depths[best] || (depths[row] == depths[best] && is_likelier);
            if (commit_slots[row] && is_better) best = row;
        }
        last_rows[i] = (int32_t)best;
        for (int64_t row = begin; row < end; ++row) commit_slots[row] = parent_rows[row] < 0 ? slots[row] : -1;
        for (int64_t row = best; row >= begin && parent_rows[row] >= 0; row = parent_rows[row])
            commit_slots[row] = slots[row];
    }
}
