// What the library tells Python of its functions, made by templates from the functions themselves.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace euryale {

// An entry of a list. kernels/cpu/native.py has the same fields.
struct Entry {
    const char* declaration;            // as the list spells it; null ends a table
    const void* address;                // null for a structure
    int (*replay)(const int64_t* words);  // calls the function with arguments from 64-bit words; null: never recorded
};

template <class T>
T from_word(int64_t word) {
    if constexpr (std::is_same_v<T, float>) {
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
        return function(from_word<A>(words[I])...);
}

template <class R, class... A>
int apply(R (*function)(A...), const int64_t* words) {
    return apply(function, words, std::index_sequence_for<A...>{});
}

template <bool IS_RECORDED, auto FUNCTION>
Entry entry(const char* declaration) {
    if constexpr (IS_RECORDED)
        return {declaration, (const void*)FUNCTION, [](const int64_t* words) { return apply(FUNCTION, words); }};
    else
        return {declaration, (const void*)FUNCTION, nullptr};
}

}  // namespace euryale

// An entry of a table, from an entry of a list.
#define EURYALE_PLAIN_ENTRY(recorded, result, name, parameters) \
    euryale::entry<recorded, euryale_##name>(#result " " #name #parameters),
