// What arguments the functions of the library take, so that a build from other sources is noticed before it is called.
#include <cstring>
#include <type_traits>

#include "interface.h"

namespace {

// v: nothing, p: an address, f: a float, otherwise the bytes of an integer.
template <class T>
constexpr char letter() {
    if constexpr (std::is_void_v<T>)
        return 'v';
    else if constexpr (std::is_pointer_v<T>)
        return 'p';
    else if constexpr (std::is_floating_point_v<T>)
        return 'f';
    else
        return '0' + sizeof(T);
}

template <class R, class... A>
constexpr char signature_of[] = {letter<R>(), letter<A>()..., 0};

template <class R, class... A>
const char* signature(R (*)(A...)) {
    return signature_of<R, A...>;
}

const struct {
    const char *name, *signature;
} functions[] = {
#define EURYALE_FUNCTION(name) {#name, signature(euryale_##name)},
    EURYALE_FUNCTION(instruction_set) EURYALE_FUNCTION(use) EURYALE_FUNCTION(tree_attention)
    EURYALE_FUNCTION(rope_qk) EURYALE_FUNCTION(add_rms_norm) EURYALE_FUNCTION(silu_mul) EURYALE_FUNCTION(add_silu)
    EURYALE_FUNCTION(take_rows) EURYALE_FUNCTION(top_k) EURYALE_FUNCTION(merge_top_k) EURYALE_FUNCTION(sample)
    EURYALE_FUNCTION(linear_size) EURYALE_FUNCTION(linear_pack) EURYALE_FUNCTION(linear_run)
    EURYALE_FUNCTION(quantized_run) EURYALE_FUNCTION(accept)
    EURYALE_FUNCTION(commit) EURYALE_FUNCTION(shared_bytes) EURYALE_FUNCTION(shared_attach)
    EURYALE_FUNCTION(shared_detach) EURYALE_FUNCTION(shared_all_reduce)
    EURYALE_FUNCTION(shared_all_reduce_add_rms_norm) EURYALE_FUNCTION(shared_all_gather)
    EURYALE_FUNCTION(shared_broadcast) EURYALE_FUNCTION(recordable) EURYALE_FUNCTION(recordable_name)
    EURYALE_FUNCTION(replay) EURYALE_FUNCTION(replay_timed)
};

}  // namespace

// The result's letter and the arguments'; null if there is no function of that name.
extern "C" const char* euryale_signature(const char* name) {
    for (const auto& function : functions)
        if (!std::strcmp(function.name, name)) return function.signature;
    return nullptr;
}
