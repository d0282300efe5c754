// The table of collectives that Python reads.
#include "collectives.h"

#include "../kernels/cpu/function_table.h"

// The entries of collectives.def. `entry_size` is the caller's sizeof(Entry); null if it differs.
extern "C" const euryale::Entry* euryale_collectives(int64_t entry_size) {
    static const euryale::Entry table[] = {
#define EURYALE_PLAIN EURYALE_PLAIN_ENTRY
#include "collectives.def"
        {}};
    return entry_size == sizeof *table ? table : nullptr;
}
