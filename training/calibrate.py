"""Measure trained heads on held-out text and search their static tree (Medusa paper, arXiv 2401.10774, 2.3.3).

``python -m euryale.training.calibrate --model DIR`` reads the backbone in DIR and the heads in ``DIR/medusa``
and writes ``calibration.json`` and ``tree.json`` beside the heads.

A greedy step accepts a guess when it is what the *backbone* would have written, so the tree is searched on the
backbone's own greedy continuations of held-out prompts. Accuracies against the held-out text are reported too.

The *rank* of a token at a head is how many tokens that head likes better, NUM_RANKS standing for "too many".
Shape suffixes: S sequences, P positions of a sequence, N positions of all, K heads, R ranks.
"""

import heapq
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from euryale.scheduler.tree import TreeShape, search_tree
from euryale.training import answers, corpus, pretrain
from euryale.training.heads import Heads

NUM_RANKS = 10
TREE_SIZES = (4, 8, 12, 16, 24, 32, 63)
# Trees are searched on the other sequences, so that what is reported of them was not fitted.
_EVERY_NTH_MEASURES = 4


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """The command's flags. ``nodes``: guesses in tree.json, the root not counted; ``prompts`` held-out prompts of
    ``prompt_tokens`` are each continued by ``new_tokens``; ``text_windows`` windows of 1024 tokens of text."""

    model: Path
    nodes: int = 10
    prompts: int = 256
    prompt_tokens: int = 64
    new_tokens: int = 128
    text_windows: int = 64
    batch: int = 64

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.prompts < _EVERY_NTH_MEASURES:
            raise ValueError(f"--nodes must be at least 1 and --prompts at least {_EVERY_NTH_MEASURES}")


@dataclass(frozen=True)
class Continuations:
    """What the heads would have said along the backbone's own greedy answers.

    ``ranks_SPK`` int64: rank of the token that came ``k + 2`` later; ``valid_SP`` bool: whether all K of these
    tokens belong to the answer, which ends at the end-of-text token. Position 0 is the prompt's last token.
    """

    ranks_SPK: np.ndarray
    valid_SP: np.ndarray

    def flat(self) -> np.ndarray:
        """Ranks at the valid positions, [N, K]."""
        return self.ranks_SPK[self.valid_SP]


@torch.no_grad()
def ranks_along(backbone, heads: Heads, tokens: torch.Tensor) -> np.ndarray:
    """For int64 tokens [S, length]: int64 [S, length - K - 1, K], at position t and head k the rank of token
    t + 2 + k, at most NUM_RANKS. Ties count in the token's favour."""
    num_positions = tokens.shape[1] - len(heads) - 1
    ranks = np.empty((tokens.shape[0], num_positions, len(heads)), dtype=np.int64)
    for s, row in enumerate(tokens):  # one sequence at a time: the logits of a batch would be large
        hidden = backbone.model(row[None], use_cache=False).last_hidden_state[0, :num_positions]
        for k, head in enumerate(heads):
            logits = head(hidden)
            true = logits.gather(1, row[2 + k : 2 + k + num_positions, None])
            ranks[s, :, k] = (logits > true).sum(-1).clamp(max=NUM_RANKS).numpy()
    return ranks


def measure_continuations(args: CalibrateOptions, backbone, heads: Heads, stream: np.ndarray) -> Continuations:
    """Continue evenly spaced prompts of the stream and rank what came out."""
    prompts = answers.spaced_prompts(stream, args.prompts, args.prompt_tokens)
    end = backbone.config.eos_token_id
    ranks, valid = [], []
    for part in prompts.split(args.batch):
        tokens = answers.continue_greedily(backbone, part, args.new_tokens)
        ranks.append(ranks_along(backbone, heads, tokens)[:, args.prompt_tokens - 1 :])
        goes_on = ((tokens[:, args.prompt_tokens :] == end).cumsum(1) == 0).numpy()
        valid.append(goes_on[:, len(heads) :])  # the last of the tokens guessed at a position lies K + 1 further
    return Continuations(np.concatenate(ranks), np.concatenate(valid))


def measure_text(args: CalibrateOptions, backbone, heads: Heads, stream: np.ndarray) -> np.ndarray:
    """Ranks of the text's own tokens over its first windows, [N, K]."""
    length = min(backbone.config.max_position_embeddings, len(stream))
    count = min(args.text_windows, len(stream) // length)
    windows = torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)
    return ranks_along(backbone, heads, windows).reshape(-1, len(heads))


def accuracy_by_rank(ranks_NK: np.ndarray) -> np.ndarray:
    """Probability that a head's guess of rank r is right, float64 [K, R]."""
    return np.stack([(ranks_NK == r).mean(axis=0) for r in range(NUM_RANKS)], axis=1)


def search_joint_tree(ranks_NK: np.ndarray, num_drafts: int, prior_count: float = 8.0) -> list[list[int]]:
    """The paths of the best static tree, in decreasing order of gain: any prefix of the list is the best tree of
    its size.

    A path adds to the expected accepted length the probability that all its guesses are right *together*. The
    paper multiplies the heads' accuracies as if they were independent; here the paths are counted. Below a path
    seen n times, the next guess's probability is its count plus ``prior_count`` times the head's accuracy, over n +
    ``prior_count``: rare paths fall back to the product. As a child never gains more than its parent, taking the
    largest gain next is optimal.
    """
    num_heads = ranks_NK.shape[1]
    accuracy = accuracy_by_rank(ranks_NK)
    counts: Counter = Counter({(): len(ranks_NK)})
    for depth in range(1, num_heads + 1):
        counts.update(map(tuple, ranks_NK[:, :depth].tolist()))
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    paths: list[list[int]] = []
    while heap and len(paths) <= num_drafts:
        negative_gain, path = heapq.heappop(heap)
        paths.append(list(path))
        if len(path) == num_heads:
            continue
        for rank in range(NUM_RANKS):
            expected = counts[(*path, rank)] + prior_count * accuracy[len(path), rank]
            heapq.heappush(heap, (negative_gain * expected / (counts[path] + prior_count), (*path, rank)))
    return paths[1:]


def accepted_lengths(ranks: np.ndarray, paths: list[list[int]]) -> np.ndarray:
    """How many guesses of a tree with all prefixes listed are accepted at each position: int64 [...] for ranks
    [..., K]."""
    base = NUM_RANKS + 1
    lengths = np.zeros(ranks.shape[:-1], dtype=np.int64)
    for depth in range(1, ranks.shape[-1] + 1):
        weights = base ** np.arange(depth)
        nodes = [int(np.dot(path, weights)) for path in paths if len(path) == depth]
        lengths += np.isin(ranks[..., :depth] @ weights, nodes)
    return lengths


def visited(measured: Continuations, paths: list[list[int]]) -> np.ndarray:
    """Where decoding steps start when every answer is walked as the engine would, bool [S, P]: after a step that
    accepted n guesses the next one starts n + 1 positions further."""
    starts = np.zeros_like(measured.valid_SP)
    for row, lengths, valid in zip(starts, accepted_lengths(measured.ranks_SPK, paths), measured.valid_SP, strict=True):
        position = 0
        while position < len(valid) and valid[position]:
            row[position] = True
            position += 1 + int(lengths[position])
    return starts


def tokens_per_step(measured: Continuations, paths: list[list[int]]) -> float:
    """Mean tokens of the steps that decode the answers."""
    starts = visited(measured, paths)
    return 1 + float(accepted_lengths(measured.ranks_SPK[starts], paths).mean())


def search_walked_tree(measured: Continuations, num_drafts: int, rounds: int = 6) -> list[list[int]]:
    """The best of a few joint trees, in decreasing order of gain.

    A decoder does not stop everywhere: it skips what it accepted, so that steps start where guessing is harder than on
    average. So every round searches on the positions where the previous round's tree stops.
    """
    best, candidates = [], measured.flat()
    for _ in range(rounds):
        paths = search_joint_tree(candidates, num_drafts)
        if not best or tokens_per_step(measured, paths) > tokens_per_step(measured, best):
            best = paths
        candidates = measured.ranks_SPK[visited(measured, paths)]
    return best


def compare_trees(searched: Continuations, measured: Continuations, sizes=TREE_SIZES) -> list[dict]:
    """One row per tree size, the trees searched on one set of answers and measured on another. ``expected``:
    1 + mean accepted length over all positions; ``tokens_per_step``: over those where steps start; ``independent``:
    the same of the tree that assumes independent heads."""
    accuracy = accuracy_by_rank(searched.flat())
    rows = []
    for size in sizes:
        paths = search_walked_tree(searched, size)
        row = {"nodes": len(paths), "expected": 1 + float(accepted_lengths(measured.flat(), paths).mean())}
        row["tokens_per_step"] = tokens_per_step(measured, paths)
        row["independent"] = tokens_per_step(measured, search_tree(accuracy, size).paths())
        rows.append({name: round(value, 4) for name, value in row.items()})
    return rows


def run(args: CalibrateOptions) -> dict:
    """Measure, search, and write both files; returns the content of ``calibration.json``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    held_files = corpus.split(corpus.standard_library_files())[1]
    stream = corpus.token_stream(tokenizer, held_files)
    backbone = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    heads = Heads.load(args.model / "medusa")
    own = measure_continuations(args, backbone, heads, stream)
    text_NK = measure_text(args, backbone, heads, stream)
    measures = np.arange(args.prompts) % _EVERY_NTH_MEASURES == _EVERY_NTH_MEASURES - 1
    searched, measured = (Continuations(own.ranks_SPK[m], own.valid_SP[m]) for m in (~measures, measures))
    if not searched.valid_SP.any() or not measured.valid_SP.any():
        raise ValueError("the backbone ends its answers at once: nothing to calibrate on")
    result = {
        "num_positions": int(own.valid_SP.sum()),
        "accuracy": accuracy_by_rank(own.flat()).round(4).tolist(),
        "num_text_positions": len(text_NK),
        "text_accuracy": accuracy_by_rank(text_NK).round(4).tolist(),
        "num_searched_positions": int(searched.valid_SP.sum()),
        "num_measured_positions": int(measured.valid_SP.sum()),
        "trees": compare_trees(searched, measured),
    }
    paths = TreeShape.from_paths(search_walked_tree(searched, args.nodes)).paths()
    result["tree"] = {"nodes": len(paths), "tokens_per_step": round(tokens_per_step(measured, paths), 4)}
    directory = args.model / "medusa"
    (directory / "tree.json").write_text(json.dumps(paths) + "\n")
    (directory / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["tree"]))
    return result


if __name__ == "__main__":
    run(pretrain.options_from_flags(CalibrateOptions, __doc__))
