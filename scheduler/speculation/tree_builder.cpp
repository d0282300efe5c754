// Builds the dynamic trees of one step for all requests at once. tree_builder_reference.py explains the method.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <queue>
#include <vector>

#include "tree_builder.h"

namespace {

// All of these are compared with constants.py when the library is loaded.
constexpr int ORDERS = 3, SUCCESSORS = 4, NUM_SOURCES = 3, MAX_RANKS = 32, LIKELY_BINS = 8, FOLD_BITS = 29;
constexpr int EXTRA = NUM_SOURCES * SUCCESSORS;
constexpr int CONTEXT = 0, TRAFFIC = 1, TEXT = 2;
constexpr uint64_t PLACE_MULTIPLIERS[] = {0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B};
constexpr uint64_t ORDER_OFFSETS[] = {0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B};
constexpr uint64_t SOURCE_MULTIPLIER = 0xA54FF53A5F1D36F1, MIX_MULTIPLIER = 0x5BE0CD19137E2179;

// Returns the row of a context. It belongs to another context unless its fingerprint is `fingerprint`.
Row* row_of(const Table& table, uint64_t sum, int order, int64_t source, uint32_t& fingerprint) {
    uint64_t key = (sum + ORDER_OFFSETS[order] + (uint64_t)source * SOURCE_MULTIPLIER) * MIX_MULTIPLIER;
    key = (key ^ (key >> FOLD_BITS)) * MIX_MULTIPLIER;
    fingerprint = (uint32_t)key;
    if (source) return table.rows + ((int64_t)1 << table.text_bits) + (key >> (64 - table.live_bits));
    return table.rows + (table.text_bits ? key >> (64 - table.text_bits) : 0);
}

uint64_t place_sum(uint64_t sum, int order, int32_t token) {
    return sum + (uint64_t)(int64_t)(token + 1) * PLACE_MULTIPLIERS[order];
}

// The successors of a context, with their fractions.
struct Known {
    int32_t tokens[SUCCESSORS];
    float fractions[SUCCESSORS];
    int evidence, cases;
};

// Looks up the longest known context in `last`, latest token first, in each source.
void find(const Table& table, const int32_t* last, const int64_t* sources, Known* out) {
    const Row* rows[NUM_SOURCES][ORDERS];
    uint32_t fingerprints[NUM_SOURCES][ORDERS];
    uint64_t sum = 0;
    int length = 0;
    for (; length < ORDERS && last[length] >= 0; ++length) {
        sum = place_sum(sum, length, last[length]);
        for (int s = 0; s < NUM_SOURCES; ++s) {
            rows[s][length] = row_of(table, sum, length, sources[s], fingerprints[s][length]);
            __builtin_prefetch(rows[s][length]);  // rows are scattered: fetch all of them at once
        }
    }
    for (int s = 0; s < NUM_SOURCES; ++s) {
        Known& known = out[s] = {{-1, -1, -1, -1}, {0, 0, 0, 0}, 0, 0};
        int o = length - 1;
        while (o >= 0 && (rows[s][o]->fingerprint != fingerprints[s][o] || !rows[s][o]->total)) --o;
        if (o < 0) continue;
        const Row& row = *rows[s][o];
        known.cases = std::min<uint32_t>(row.total, SUCCESSORS);
        known.evidence = o * SUCCESSORS + known.cases;
        for (int i = 0; i < known.cases; ++i) {
            known.tokens[i] = row.successors[i];
            known.fractions[i] = sources[s] ? 1.0f / known.cases : row.fractions[i] / 65535.0f;
        }
    }
}

// Returns how many half octaves a fraction lies below 1/2.
int half_octaves(float fraction) {
    int32_t bits;
    std::memcpy(&bits, &fraction, 4);
    return 251 - (bits >> 22);
}

int bin_of(float probability, int bins) {
    const int unlikely = bins - LIKELY_BINS;
    if (probability < 0.5f) return std::max(unlikely - 1 - half_octaves(probability), 0);
    return unlikely + std::clamp(half_octaves(1 - probability), 0, LIKELY_BINS - 1);
}

struct HeapEntry {
    double key;
    int32_t parent, child;  // index among the children of node `parent`
    bool operator<(const HeapEntry& other) const {
        if (key != other.key) return key < other.key;
        return parent != other.parent ? parent > other.parent : child > other.child;
    }
};

// The state of growing the trees of one step.
struct Growth {
    Arguments& f;
    std::priority_queue<HeapEntry> heap;
    std::vector<int32_t> lasts, nodes_of;
    std::vector<float> powers;  // of head probabilities: for each head its R candidates, then any other token
    std::vector<bool> has_powers;
    int64_t nodes = 0, children = 0;

    explicit Growth(Arguments& f)
        : f(f),
          lasts((f.requests + f.max_draft_tokens) * ORDERS),
          nodes_of(f.requests, 0),
          powers(f.requests * f.heads * (f.ranks + 1)),
          has_powers(f.requests * f.heads, false) {}

    const float* powers_of(int64_t head) {
        float* out = powers.data() + head * (f.ranks + 1);
        if (has_powers[head]) return out;
        has_powers[head] = true;
        const float* logits = f.logits + head * f.ranks;
        const float top = *std::max_element(logits, logits + f.ranks);
        float sum = 0;
        for (int k = 0; k < f.ranks; ++k) sum += std::exp(logits[k] - top);
        const float total = top + std::log(sum);
        for (int k = 0; k < f.ranks; ++k) out[k] = std::exp(f.head_power * (logits[k] - total));
        out[f.ranks] = std::exp(f.head_power * (logits[f.ranks - 1] - total - f.outsider_nats));
        return out;
    }

    void add(int request, int parent, int token, float probability) {
        const int64_t node = nodes++;
        f.request[node] = request, f.parent[node] = parent, f.token[node] = token;
        f.acceptance_probability[node] = probability;
        f.depth[node] = parent < 0 ? 0 : f.depth[parent] + 1;
        f.expected_children[node] = 0, f.evidence[node] = -1, f.first[node] = children, f.count[node] = 0;
        int32_t* last = lasts.data() + node * ORDERS;
        last[0] = token;
        std::copy_n(parent < 0 ? f.last + request * ORDERS + 1 : lasts.data() + parent * ORDERS, ORDERS - 1, last + 1);
    }

    // Pushes a possible child of a node onto the heap, if it is likely enough.
    void push_child(int node, int child) {
        if (child == f.count[node]) return;
        const double key = (double)f.children[f.first[node] + child].acceptance_probability * f.values[f.request[node]];
        if (key >= f.min_probability) heap.push({key, node, child});
    }

    void expand(int node) {
        const int request = f.request[node];
        const double value = (double)f.acceptance_probability[node] * f.values[request];
        if (f.depth[node] >= f.depths[request] || value < f.min_probability) return;
        f.first[node] = children;
        children += f.count[node] = write_children(node, f.children + children);
        push_child(node, 0);
    }

    // Writes the possible children of a node, likeliest first; returns how many.
    int write_children(int node, Child* out) {
        const int r = f.request[node], depth = f.depth[node];
        const int64_t head = r * f.heads + depth;
        const int ranks = depth < f.heads && f.ids[head * f.ranks] >= 0 ? f.ranks : 0;
        int32_t tokens[MAX_RANKS + EXTRA];
        float fractions[NUM_SOURCES][MAX_RANKS + EXTRA] = {};
        if (ranks) std::copy_n(f.ids + head * f.ranks, ranks, tokens);
        int total = ranks;
        Known known[NUM_SOURCES];
        find(f.table, lasts.data() + node * ORDERS, f.sources + r * NUM_SOURCES, known);
        for (int s = 0; s < NUM_SOURCES; ++s) {
            for (int i = 0; i < known[s].cases; ++i) {
                const int place = std::find(tokens, tokens + total, known[s].tokens[i]) - tokens;
                if (place == total) tokens[total++] = known[s].tokens[i];
                fractions[s][place] += known[s].fractions[i];
            }
        }
        f.evidence[node] = known[CONTEXT].evidence;
        const float cases = known[TRAFFIC].cases, text_cases = known[TEXT].cases ? f.text_cases : 0;
        const float traffic_weight = cases / (cases + text_cases + 1e-6f), power = ranks ? f.prior_power : 1;
        const float floor = std::pow(f.prior_floor, power), *powers = ranks ? powers_of(head) : nullptr;
        float product[MAX_RANKS + EXTRA], sum = f.other_mass;
        for (int i = 0; i < total; ++i) {
            const float prior = traffic_weight * fractions[TRAFFIC][i] + (1 - traffic_weight) * fractions[TEXT][i];
            product[i] = prior > 0 ? std::pow(prior + f.prior_floor, power) : floor;
            if (ranks) product[i] *= powers[std::min(i, ranks)];
            sum += product[i];
        }
        const int cls = f.classes[r], level = std::min<int>(depth, f.num_depths - 1);
        const float weight = f.weights[cls * f.num_evidence_classes + known[CONTEXT].evidence];
        const float rest = (1 - weight) / sum;
        int written = 0;
        for (int i = 0; i < total; ++i) {
            const float context = weight * fractions[CONTEXT][i], probability = context + rest * product[i];
            if (probability < f.min_child_probability) continue;
            const int rank = i < ranks ? std::min(i, 2) : 3;
            const int row = (cls * f.num_depths + level) * f.rank_classes + rank;
            const int cell = row * f.bins + bin_of(probability, f.bins);
            const float alone = std::min(probability * f.ratios[cell] * f.factors[r], f.max_probability);
            const float joint = f.acceptance_probability[node] * alone;
            int place = written++;
            for (; place > 0 && out[place - 1].acceptance_probability < joint; --place) out[place] = out[place - 1];
            out[place] = {tokens[i], cell, joint, probability, context};
        }
        return written;
    }

    void run() {
        for (int r = 0; r < f.requests; ++r) add(r, -1, f.last[r * ORDERS], 1);
        for (int r = 0; r < f.requests; ++r) expand(r);
        while (!heap.empty() && nodes < f.requests + f.max_draft_tokens) {
            const HeapEntry best = heap.top();
            heap.pop();
            const int request = f.request[best.parent];
            if (nodes_of[request] == f.max_per_request) continue;
            ++nodes_of[request];
            const Child& child = f.children[f.first[best.parent] + best.child];
            f.expected_children[best.parent] += child.acceptance_probability / f.acceptance_probability[best.parent];
            add(request, best.parent, child.token, child.acceptance_probability);
            push_child(best.parent, best.child + 1);
            expand(nodes - 1);
        }
    }
};

}  // namespace

// Grows the trees; returns the number of nodes, with the roots, which come first.
extern "C" int64_t tree_builder_grow(Arguments* arguments) {
    Growth growth(*arguments);
    growth.run();
    return growth.nodes;
}

// Updates the statistics by accepted nodes and the tokens emitted after them.
extern "C" void tree_builder_learn(const Arguments* arguments, int64_t count, const int32_t* nodes,
                                   const int32_t* truths) {
    const Arguments& f = *arguments;
    for (int64_t i = 0; i < count; ++i) {
        const int node = nodes[i], cls = f.classes[f.request[node]];
        if (f.evidence[node] < 0) continue;  // its children were not searched
        double context = 0;
        for (int g = f.first[node]; g < f.first[node] + f.count[node]; ++g) {
            const Child& child = f.children[g];
            const bool is_right = child.token == truths[i];
            if (is_right) context = child.context / child.probability;
            double &accepted = f.accepted[child.cell], &predicted = f.predicted[child.cell];
            accepted += is_right, predicted += child.probability;
            const double shrink = f.window / std::max(predicted, (double)f.window);
            accepted *= shrink, predicted *= shrink;
            f.ratios[child.cell] = accepted / predicted;
        }
        if (!f.evidence[node]) continue;
        const int64_t at = cls * f.num_evidence_classes + f.evidence[node];
        f.context_accepted[at] += context, f.context_cases[at] += 1;
        const double shrink = f.window / std::max(f.context_cases[at], (double)f.window);
        f.context_accepted[at] *= shrink, f.context_cases[at] *= shrink;
        f.weights[at] = f.context_accepted[at] / f.context_cases[at];
    }
}

// Adds `count` sequences to the table. They are concatenated in `tokens`; sequence n has lengths[n] tokens, of which
// those from starts[n] on are new.
extern "C" void ngrams_add(const Table* table, int64_t count, const int32_t* tokens, const int64_t* lengths,
                           const int64_t* starts, const int64_t* sources) {
    for (int64_t n = 0; n < count; tokens += lengths[n++])
        for (int64_t at = std::max<int64_t>(starts[n], 1); at < lengths[n]; ++at) {
            uint64_t sum = 0;
            for (int o = 0; o < ORDERS && o < at; ++o) {
                sum = place_sum(sum, o, tokens[at - 1 - o]);
                uint32_t fingerprint;
                Row* row = row_of(*table, sum, o, sources[n], fingerprint);
                if (row->fingerprint != fingerprint) *row = {fingerprint, 0, {-1, -1, -1, -1}, {0, 0, 0, 0}};
                row->successors[row->total % SUCCESSORS] = tokens[at];
                // The next successor goes to place total % SUCCESSORS, which has the oldest one if the row is full.
                row->total = row->total + 1 < 2 * SUCCESSORS ? row->total + 1 : SUCCESSORS;
            }
        }
}

// Returns whether Python has the same constants and struct sizes; `values` in the order of tree_builder.py.
extern "C" int tree_builder_matches(const uint64_t* values, int64_t count) {
    std::vector<uint64_t> own(PLACE_MULTIPLIERS, PLACE_MULTIPLIERS + ORDERS);
    own.insert(own.end(), ORDER_OFFSETS, ORDER_OFFSETS + ORDERS);
    for (uint64_t value : {SOURCE_MULTIPLIER, MIX_MULTIPLIER, (uint64_t)ORDERS, (uint64_t)SUCCESSORS,
                           (uint64_t)NUM_SOURCES, (uint64_t)MAX_RANKS, (uint64_t)LIKELY_BINS, (uint64_t)FOLD_BITS,
                           (uint64_t)sizeof(Arguments), (uint64_t)sizeof(Child), (uint64_t)sizeof(Row)})
        own.push_back(value);
    return own.size() == (size_t)count && std::equal(own.begin(), own.end(), values);
}
