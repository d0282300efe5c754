// The walk down every candidate tree on a CPU.
#include <algorithm>
#include <vector>

#include "../cpu/interface.h"

// The deepest path of fitting rows of every tree; of equally deep ones the highest scored end, then the first.
extern "C" void euryale_accept(int64_t num_rows, int64_t num_segments, const int64_t* parent_rows,
                               const int64_t* segment_of_row, const int64_t* depths, const int64_t* roots,
                               const bool* fits, const float* scores, int64_t* last, bool* accepted) {
    std::vector<char> reached(num_rows, 0);
    for (int64_t i = 0; i < num_segments; ++i) reached[last[i] = roots[i]] = 1;
    for (int64_t row = 0; row < num_rows; ++row) {  // parents come before their children
        if (parent_rows[row] < 0 || !fits[row] || !reached[parent_rows[row]]) continue;
        reached[row] = 1;
        int64_t& end = last[segment_of_row[row]];
        if (depths[row] > depths[end] || (depths[row] == depths[end] && scores[row] > scores[end])) end = row;
    }
    std::fill(accepted, accepted + num_rows, false);
    for (int64_t i = 0; i < num_segments; ++i)
        for (int64_t row = last[i]; parent_rows[row] >= 0; row = parent_rows[row]) accepted[row] = true;
}
