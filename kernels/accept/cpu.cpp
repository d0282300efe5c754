// The walk down every candidate tree on a CPU.
#include <algorithm>

#include "../cpu/interface.h"

// The deepest path of fitting rows of every tree; of equally deep ones the highest scored end, then the first. A draft
// fits if its token is the next token of its parent's row, or as `good` says where that is given and not negative.
// `kept`: the slots of certain and accepted rows, -1 elsewhere. `good` and `scores` may be missing.
extern "C" void euryale_accept(const euryale::Step* step, const int64_t* parent_rows, const int64_t* depths,
                               const int64_t* slots, const int32_t* tokens, const int32_t* next_tokens,
                               const int8_t* good, const float* scores, int32_t* last, int64_t* kept) {
    for (int64_t i = 0; i < step->num_segments; ++i) {
        const int64_t begin = step->row_starts[i], end = step->row_starts[i + 1];
        const int64_t root = begin + step->num_new_tokens[i] - 1;
        int64_t best = root;
        // While the walk is under way kept is 1 where a row is reached, 0 elsewhere.
        for (int64_t row = begin; row < end; ++row) {
            const int64_t parent = parent_rows[row];
            kept[row] = 1;
            if (parent < 0) continue;
            const bool fits = good && good[row] >= 0 ? good[row] : tokens[row] == next_tokens[parent];
            kept[row] = fits && kept[parent];  // parents come before their children
            const bool is_likelier = scores && scores[row] > scores[best];
            if (kept[row] && (depths[row] > depths[best] || (depths[row] == depths[best] && is_likelier))) best = row;
        }
        last[i] = (int32_t)best;
        for (int64_t row = begin; row < end; ++row) kept[row] = parent_rows[row] < 0 ? slots[row] : -1;
        for (int64_t row = best; row >= begin && parent_rows[row] >= 0; row = parent_rows[row]) kept[row] = slots[row];
    }
}
