"""Every constant of speculation, in one place. ``tree_builder.cpp`` has its own copies of the integers and of the
hash multipliers, which are compared when it is loaded."""

import numpy as np

# ---- n-grams
ORDERS = 3  # lengths of contexts: 1 to ORDERS tokens
SUCCESSORS = 4  # tokens remembered after a context
NUM_SOURCES = 3  # where a request looks contexts up: its own tokens, recent traffic, calibration text
TEXT_SOURCE = 0  # id of the calibration text
EMPTY_SOURCE = 1  # id of a source that nothing is ever learned from
LIVE_BITS, MAX_LIVE_BITS, TEXT_BITS = 18, 21, 16  # logarithms of numbers of rows; a row has 32 bytes
MAX_LEARNED = 4096  # tokens learned from one request at once, its last ones
# Odd multipliers of 64-bit multiplicative hashing: fractional bits of the square roots of small primes.
PLACE_MULTIPLIERS = np.array([0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B], dtype=np.uint64)
ORDER_OFFSETS = np.array([0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B], dtype=np.uint64)
SOURCE_MULTIPLIER = np.uint64(0xA54FF53A5F1D36F1)
MIX_MULTIPLIER = np.uint64(0x5BE0CD19137E2179)
FOLD_BITS = np.uint64(29)

# ---- acceptance statistics
NUM_CLASSES = 4  # of sampling: greedy, cool, hot, typical acceptance
RANK_CLASSES = 4  # a head's likeliest token, its second, its others, and tokens that it did not name
LIKELY_BINS = 8  # of probabilities from 1/2 on, two for each halving of the distance to 1
BINS = 18 + LIKELY_BINS  # of probability, below 1/2 two for each factor of two
WINDOW = 60.0  # cases that an estimate remembers
PRIOR_CASES = 4.0  # cases that a starting value counts for
CORRECTION_DECAY = 0.93  # of what is known of a request's acceptance rate, per step
CORRECTION_RANGE = (0.3, 1.6)
# How often what followed the context before was the better guide than heads and text, by evidence: the context's
# length less one times SUCCESSORS, plus the number of known successors. Measured on sampled code.
CONTEXT_WEIGHTS = (0, 0.15, 0.1, 0.2, 0.25, 0.4, 0.3, 0.35, 0.5, 0.6, 0.6, 0.75, 0.9)

# ---- trees
MAX_RANKS = 32  # head candidates of one depth
MIN_PROBABILITY = 1e-3  # minimum acceptance probability of a tree node
BEHIND_TARGET_VALUE = 4.0  # value of a draft token of a request behind its latency target, beside others' 1
# Of the product of experts; fitted to answers of the demo model, the result is flat around these values.
PRODUCT = {
    "head_power": 0.9,
    "prior_power": 0.4,
    "floor": 1e-4,  # prior of a token that never followed
    "other": 2e-3,  # mass of all tokens that nobody named, beside the products
    "text_cases": 2.0,  # cases of recent traffic that the text's word counts for
    "unnamed": 1.0,  # nats that a token lies below the last one that the head names
    "highest": 0.98,  # largest acceptance probability of a single draft token
    "slightest": 2e-3,  # smallest probability of a child that is kept
    "window": WINDOW,
}

# ---- budget
MIN_PAUSE, MAX_PAUSE = 16, 256  # steps without heads between two trials of them
MIN_TRIAL_INTERVAL, MAX_TRIAL_INTERVAL = 64, 512  # speculative steps between two trials of plain decoding
TRIAL_STEPS = 2  # plain steps of a trial
GAIN_MARGIN = 0.01  # of the logarithm of two rates' ratio, for and against a change
NEWEST_WEIGHT = 0.2  # of the newest step in the mean of that logarithm
RATE_WEIGHT = 0.05  # of the newest step in the measured rate of speculation
PRIOR_STEPS = 8  # measured steps that the profile counts for
UNCERTAINTY = 0.25  # of a predicted gain's logarithm: what may be wrong, so that it is measured now and then
NUM_PLAIN_SAMPLES = 9  # plain steps whose median is the measured rate of plain decoding
MIN_PROPOSED = 32  # draft tokens that the budget is shown at least
