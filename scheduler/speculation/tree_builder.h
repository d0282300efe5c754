// Inputs and outputs of the tree builder, as tree_builder.py lays them out.
#pragma once
#include <cstdint>

struct Row {
    uint32_t fingerprint, total;
    int32_t successors[4];
    uint16_t fractions[4];  // in rows of the text, in units of 1/65535
};

struct Table {
    Row* rows;
    int64_t text_bits, live_bits;
};

// A possible child of a node.
struct Child {
    int32_t token, cell;
    float acceptance_probability, probability, context;
};

struct Arguments {
    Table table;
    int64_t requests, heads, ranks, max_draft_tokens, max_per_request, num_depths, rank_classes, bins,
        num_evidence_classes;
    float min_probability, head_power, prior_power, prior_floor, other_mass, text_cases, outsider_nats, max_probability,
        min_child_probability, window;
    // Requests (TreeRoots).
    const int32_t *last, *ids;
    const float* logits;
    const int32_t *depths, *classes;
    const float *factors, *values;
    const int64_t* sources;
    // Acceptance statistics.
    float *weights, *ratios;
    double *accepted, *predicted, *context_accepted, *context_cases;
    // Nodes and their possible children.
    int32_t *request, *parent, *token, *depth;
    float *acceptance_probability, *expected_children;
    int32_t *evidence, *first, *count;
    Child* children;
};
