// Recorded calls, run again one after the other: what a CUDA graph does for a GPU's launches.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "interface.h"

namespace {

template <class T>
T from_word(int64_t word) {
    if constexpr (std::is_pointer_v<T>) {
        return (T)word;
    } else if constexpr (std::is_same_v<T, float>) {
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    } else {
        return (T)word;
    }
}

template <class R, class... A, size_t... I>
int apply(R (*function)(A...), const int64_t* words, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>)
        return function(from_word<A>(words[I])...), 0;
    else
        return (int)function(from_word<A>(words[I])...);
}

template <class R, class... A>
int apply(R (*function)(A...), const int64_t* words) {
    return apply(function, words, std::index_sequence_for<A...>{});
}

template <auto Function>
int call(const int64_t* words) {
    return apply(Function, words);
}

struct Recordable {
    const char* name;
    int (*call)(const int64_t*);
};

constexpr Recordable recordable[] = {
    {"accept", call<euryale_accept>},
    {"add_silu", call<euryale_add_silu>},
    {"commit", call<euryale_commit>},
    {"merge_top_k", call<euryale_merge_top_k>},
    {"sample", call<euryale_sample>},
    {"shared_all_gather", call<euryale_shared_all_gather>},
    {"take_rows", call<euryale_take_rows>},
    {"top_k", call<euryale_top_k>},
    {"tree_attention", call<euryale_tree_attention>},
    {"rope_qk", call<euryale_rope_qk>},
    {"add_rms_norm", call<euryale_add_rms_norm>},
    {"silu_mul", call<euryale_silu_mul>},
    {"linear_run", call<euryale_linear_run>},
    {"quantized_run", call<euryale_quantized_run>},
    {"shared_all_reduce_add_rms_norm", call<euryale_shared_all_reduce_add_rms_norm>},
};

}  // namespace

extern "C" {

// Place of an operation in the table, -1 if it cannot be recorded.
int64_t euryale_recordable(const char* name) {
    for (size_t i = 0; i < sizeof recordable / sizeof *recordable; ++i)
        if (!std::strcmp(recordable[i].name, name)) return (int64_t)i;
    return -1;
}

// `words`: for every call its place in the table, the number of its arguments, and these; floats as their bits. Stops
// at the first call that returns something else than 0, and returns that.
int euryale_replay(const int64_t* words, int64_t count) {
    for (const int64_t* end = words + count; words < end; words += 2 + words[1])
        if (const int problem = recordable[*words].call(words + 2)) return problem;
    return 0;
}

// The same; adds the nanoseconds of each call to those of its operation.
int euryale_replay_timed(const int64_t* words, int64_t count, int64_t* nanoseconds) {
    for (const int64_t* end = words + count; words < end; words += 2 + words[1]) {
        const auto started = std::chrono::steady_clock::now();
        if (const int problem = recordable[*words].call(words + 2)) return problem;
        nanoseconds[*words] += (std::chrono::steady_clock::now() - started).count();
    }
    return 0;
}

const char* euryale_recordable_name(int64_t place) {
    return place < (int64_t)(sizeof recordable / sizeof *recordable) ? recordable[place].name : nullptr;
}

}  // extern "C"
