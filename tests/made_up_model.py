"""A random model for the scheduler's tests, and requests for it."""

import numpy as np

from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.tree import default_tree
from euryale.scheduler.step_result import HeadCandidates, SegmentResult

LIMITS = SchedulerLimits(
    max_model_len=60,
    max_num_seqs=4,
    max_num_batched_tokens=12,
    vocab_size=50,
    num_pages=20,
    page_size=4,
    end_ids=frozenset([2]),
)
TREE = default_tree(3, 9)
CANDIDATES = 8  # of each head


def request(key: int, length: int, first: int = 7, **params) -> Request:
    """A request whose prompt is ``first`` followed by sevens."""
    prompt = np.full(length, 7, dtype=np.int32)
    prompt[0] = first
    return Request(key=key, prompt=prompt, params=SamplingParams(**params))


def results(planned, rng, token=9) -> list[SegmentResult]:
    """Return the results of a model that accepts a random path of each tree."""
    out = []
    for segment in planned.plan.segments:
        if not segment.emits_tokens:
            continue
        path, node = [], 0
        while True:
            children = [i + 1 for i, p in enumerate(segment.parents) if p == node]
            if not children or rng.random() < 0.4:
                break
            node = int(rng.choice(children))
            path.append(node)
        root = segment.num_new_tokens - 1
        tokens = [int(segment.tokens[root + n]) for n in path] + [token]
        candidates = None
        if segment.wants_head_candidates:
            logits = np.sort(rng.normal(size=(3, CANDIDATES)), axis=1)[:, ::-1].astype(np.float32)
            candidates = HeadCandidates(
                rng.integers(10, 50, size=(3, CANDIDATES)).astype(np.int32), np.ascontiguousarray(logits)
            )
        out.append(SegmentResult(tokens=tokens, accepted_nodes=path, head_candidates=candidates))
    return out


def deepest(segment) -> int:
    """The depth of the segment's tree."""
    depths = [0]
    for parent in segment.parents:
        depths.append(depths[parent] + 1)
    return max(depths)
