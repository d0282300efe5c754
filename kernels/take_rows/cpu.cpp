// Gathers rows of a table on a CPU.
#include <cstring>

#include "../cpu/operations.h"

// `size`: bytes of a row. `out` [repeat, count] rows; zeros where the table, which has `table_rows`, has no such row.
extern "C" void euryale_take_rows(int64_t count, int64_t repeat, int64_t size, int64_t table_rows, int64_t offset,
                                  const char* table, const int32_t* rows, char* out) {
    for (int64_t i = 0; i < repeat * count; ++i) {
        const int64_t row = rows[i % count] - offset;
        if (row >= 0 && row < table_rows)
            std::memcpy(out + i * size, table + row * size, size);
        else
            std::memset(out + i * size, 0, size);
    }
}
