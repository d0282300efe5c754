// Picks the widest instruction set that the CPU has, once, and makes the table of functions that Python reads.
#include "dispatch.h"
#include "function_table.h"
#include "std.h"

namespace {

struct InstructionSet {
    const char* name;
    bool is_here;
    const euryale::Ops* ops;
};

// The widest first.
const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> all = [] {
        std::vector<InstructionSet> found;
#ifdef __x86_64__
        __builtin_cpu_init();
        const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool has_256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        found.push_back({"avx512_bf16", has_512 && __builtin_cpu_supports("avx512bf16"), &euryale::avx512_bf16_ops});
        found.push_back({"avx512", has_512, &euryale::avx512_ops});
        found.push_back({"avx2", has_256, &euryale::avx2_ops});
#endif
        found.push_back({"baseline", true, &euryale::baseline_ops});
        return found;
    }();
    return all;
}

const InstructionSet* best() {
    for (const InstructionSet& set : instruction_sets())
        if (set.is_here) return &set;
    return nullptr;
}

const InstructionSet* chosen = best();

// A kernel as one function, which calls that of the instruction set in use.
template <auto KERNEL>
struct Dispatched;

template <class R, class... A, R (*euryale::Ops::*KERNEL)(A...)>
struct Dispatched<KERNEL> {
    static R call(A... arguments) { return (chosen->ops->*KERNEL)(arguments...); }
};

}  // namespace

const euryale::Ops* euryale::kernels() { return chosen->ops; }

extern "C" {

const char* euryale_instruction_set() { return chosen->name; }

// For tests: uses a narrower set than the best. Returns 0 if this CPU has none of that name. Weights that were packed
// before are of no use to the new set.
int euryale_use(const char* name) {
    for (const InstructionSet& set : instruction_sets())
        if (set.is_here && !std::strcmp(set.name, name)) {
            chosen = &set;
            return 1;
        }
    return 0;
}

// The entries of operations.def. `entry_size` is the caller's sizeof(Entry); null if it differs.
const euryale::Entry* euryale_operations(int64_t entry_size) {
    static const euryale::Entry table[] = {
#define EURYALE_STRUCTURE(name, ...) {"struct " #name " {" #__VA_ARGS__ "}", nullptr, nullptr},
#define EURYALE_VECTORISED(recorded, result, name, parameters) \
    euryale::entry<recorded, Dispatched<&euryale::Ops::name>::call>(#result " " #name #parameters),
#define EURYALE_PLAIN EURYALE_PLAIN_ENTRY
#include "operations.def"
        {}};
    return entry_size == sizeof *table ? table : nullptr;
}

}  // extern "C"
