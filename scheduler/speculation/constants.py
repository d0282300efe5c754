"""All constants of speculation.

``tree_builder.cpp`` has its own copies of integers and hash multipliers. They are compared when it is loaded.
"""

import numpy as np

# ---- n-grams
ORDERS = 3  # lengths of contexts: 1 to ORDERS tokens
SUCCESSORS = 4  # tokens remembered after a context
NUM_SOURCES = 3  # sources of a request: its own tokens, recent traffic, calibration text
TEXT_SOURCE = 0  # id of the calibration text
EMPTY_SOURCE = 1  # id of a source that stays empty
LIVE_BITS, MAX_LIVE_BITS, TEXT_BITS = 18, 21, 16  # log2 of numbers of rows; a row has 32 bytes
MAX_LEARNED = 4096  # last tokens of a request that are learned at once
# Odd multipliers of 64-bit multiplicative hashing: fractional bits of the square roots of small primes.
PLACE_MULTIPLIERS = np.array([0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B], dtype=np.uint64)
ORDER_OFFSETS = np.array([0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B], dtype=np.uint64)
SOURCE_MULTIPLIER = np.uint64(0xA54FF53A5F1D36F1)
MIX_MULTIPLIER = np.uint64(0x5BE0CD19137E2179)
FOLD_BITS = np.uint64(29)

# ---- acceptance statistics
NUM_CLASSES = 4  # sampling classes: greedy, temperature up to 0.5, above, typical acceptance
RANK_CLASSES = 4  # a head's likeliest candidate, its second, its others, and tokens that are not candidates
LIKELY_BINS = 8  # bins of probabilities from 1/2 on, two for each halving of the distance to 1
BINS = 18 + LIKELY_BINS  # bins of probabilities, below 1/2 two for each factor of two
WINDOW = 60.0  # cases after which an estimate forgets
PRIOR_CASES = 4.0  # weight of an initial value, in cases
CORRECTION_DECAY = 0.93  # per step, of an acceptance-rate correction
CORRECTION_RANGE = (0.3, 1.6)
# Initial weight of the request's own context beside heads, traffic and text, by evidence class (see AcceptanceStats).
# Measured on sampled code.
CONTEXT_WEIGHTS = (0, 0.15, 0.1, 0.2, 0.25, 0.4, 0.3, 0.35, 0.5, 0.6, 0.6, 0.75, 0.9)

# ---- trees
MAX_RANKS = 32  # maximum number of head candidates of one depth
MIN_PROBABILITY = 1e-3  # minimum acceptance probability of a tree node
BEHIND_TARGET_VALUE = 4.0  # value of a draft token of a request behind its latency target; that of others is 1
# Parameters of the product of experts, fitted to answers of the demo model; the optimum is flat.
PRODUCT = {
    "head_power": 0.9,
    "prior_power": 0.4,
    "prior_floor": 1e-4,  # prior of a token that never followed
    "other_mass": 2e-3,  # mass of all tokens that no source proposes, beside the products
    "text_cases": 2.0,  # weight of the text, in cases of recent traffic
    "outsider_nats": 1.0,  # nats by which a token outside the head candidates is less likely than the last candidate
    "max_probability": 0.98,  # maximum acceptance probability of a draft token below its parent
    "min_child_probability": 2e-3,  # minimum probability of a child below its parent
    "window": WINDOW,
}

# ---- budget
MIN_PAUSE, MAX_PAUSE = 16, 256  # steps without heads until they are tried again
MEASURED_INTERVAL = 8  # steps of a pause of which one is measured
MIN_TRIAL_INTERVAL, MAX_TRIAL_INTERVAL = 64, 512  # speculative steps between two trials of plain decoding
TRIAL_STEPS = 2  # plain steps of a trial
GAIN_MARGIN = 0.01  # mean loss from which speculation ends, as a log ratio of rates
STARTING_GAIN = 0.03  # predicted gain from which it starts; predictions are less certain than means
NEWEST_WEIGHT = 0.2  # weight of the newest step in the mean log ratio
RATE_WEIGHT = 0.05  # weight of the newest step in the measured rate of speculation
PRIOR_STEPS = 8  # weight of the profile, in measured steps
FORGETTING = 0.005  # what measured rates of speculation lose of their weight at each pause
UNCERTAINTY = 0.25  # possible error of a profiled log ratio, before any measurement; smaller losses are measured
NUM_PLAIN_SAMPLES = 9  # plain steps whose median is the measured rate of plain decoding
MIN_PROPOSED = 32  # minimum number of draft tokens that the budget chooses from
