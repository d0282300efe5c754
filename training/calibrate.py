"""Calibration: accuracy of trained heads on held-out data, and the search of their static tree (Medusa paper, arXiv
2401.10774, section 2.3.3).

Greedy decoding accepts a draft token when it equals the *backbone's* next token. Trees are therefore searched on the
backbone's own greedy answers to held-out prompts. Accuracy on the held-out text is reported too. The results are
written beside the heads: ``tree.json``, ``calibration.json``, ``ngrams.safetensors``, ``tree.png``, ``accuracy.png``.

Shape suffixes as in ``tree_search``; B rows, L positions, W windows.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch

from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.runtime.config import EngineConfig
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.speculation.ngram_table import NgramTable
from euryale.scheduler.speculation.tree import load_tree
from euryale.training import answers, losses, pictures, tree_search
from euryale.training import backbone as backbones
from euryale.training.data import load_documents
from euryale.training.heads import Heads
from euryale.training.model import BackboneWithHeads
from euryale.training.options import CalibrateOptions
from euryale.training.packing import Batch, Windows, pack
from euryale.training.replay import AnswerRecord, replay
from euryale.training.tree_search import NUM_RANKS, Continuations

# Every fourth answer is held back to measure trees that were searched on the others.
_MEASURED_STRIDE = 4
DYNAMIC_SIZES = (8, 16, 63)
_MAX_TEXT_TOKENS = 1_000_000  # tokens of text in the n-gram table


class HeadRanker(BackboneWithHeads):
    """Ranks given tokens among the heads' candidates."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``(ranks, ids, logits)`` for every position t and head k.

        ``ranks`` int64 [B, L, K]: rank of token t + 2 + k at head k, at most NUM_RANKS, which also stands for a missing
        token. ``ids`` int64 and ``logits`` float32 [B, L, K, R]: the heads' top-R candidates.
        """
        hidden_BLD = self.hidden_states(batch)
        ranks, candidates = [], []
        with torch.no_grad():
            for k, head in enumerate(self.heads):
                logits_BLV = self._head_logits(head, hidden_BLD.float()).float()
                tokens_BL = torch.zeros_like(batch.tokens)
                tokens_BL[:, : -2 - k] = batch.tokens[:, 2 + k :]
                rank_BL = losses.rank_of(logits_BLV, tokens_BL).clamp(max=NUM_RANKS)
                rank_BL[:, -2 - k :] = NUM_RANKS
                ranks.append(rank_BL)
                candidates.append(logits_BLV.topk(NUM_RANKS))
        return (
            torch.stack(ranks, dim=2),
            torch.stack([c.indices for c in candidates], dim=2),
            torch.stack([c.values for c in candidates], dim=2),
        )


def own_answers(
    args: CalibrateOptions, prompts: list[np.ndarray], group: Group, temperature: float = 0.0
) -> list[dict]:
    """Return the backbone's answers, one row with ``prompt_tokens`` and ``tokens`` per prompt, the same on every rank.
    Prompts that the KV cache cannot hold are left out."""
    config = EngineConfig(
        model=args.model,
        tree="off",
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(512, args.max_num_seqs),
    )
    out = io.StringIO()
    answers.write_answers(
        config, group, prompts, SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=0), out
    )
    content = np.frombuffer(out.getvalue().encode(), dtype=np.uint8).astype(np.int32)
    content = group.broadcast(content if group.is_leader else None).astype(np.uint8)
    rows = [json.loads(line) for line in content.tobytes().decode().split("\n") if line]
    return [row for row in rows if "prompt_tokens" in row]  # the others have an error


def rank_windows(model: HeadRanker, windows: Windows, group: Group) -> list[np.ndarray]:
    """Return the HeadRanker's three outputs for every window, [W, L, K] and twice [W, L, K, R], computed by all ranks
    together."""
    count = -(-len(windows) // group.size) * group.size  # FSDP requires the same number of model runs on every rank
    found: tuple[list[torch.Tensor], ...] = ([], [], [])
    for number in range(count)[group.own_items(count)]:
        batch = windows.batch(np.asarray([number % len(windows)])).to(group.device)
        for parts, part in zip(found, model(batch), strict=True):
            parts.append(part[0])
    # Ranks took windows in turn: [size, count / size, ...] is transposed back to the order of the windows.
    tree = (group.all_gather(torch.stack(parts)).transpose(0, 1).flatten(0, 1) for parts in found)
    return [part[: len(windows)].cpu().numpy() for part in tree]


def as_windows(written: list[dict]) -> Windows:
    """Return one padded window per answer, the prompt followed by the answer."""
    rows = [row["prompt_tokens"] + row["tokens"] for row in written]
    shape = (len(rows), max(map(len, rows)))
    tokens, is_padding = np.zeros(shape, dtype=np.int32), np.ones(shape, dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], is_padding[i, : len(row)] = row, False
    return Windows(tokens, ~is_padding, is_padding.astype(np.int32))


def measure_answers(
    args: CalibrateOptions, model: HeadRanker, written: list[dict], group: Group
) -> tuple[Continuations, list[AnswerRecord]]:
    """Return the ranks of the answers' tokens, and the answers with the heads' candidates along them."""
    num_heads = len(model.heads)
    shape = (len(written), args.max_tokens, num_heads)
    ranks, valid = np.full(shape, NUM_RANKS), np.zeros(shape[:2], dtype=bool)
    recorded: list[AnswerRecord] = []
    along = zip(written, *rank_windows(model, as_windows(written), group), strict=True)
    for s, (row, ranks_LK, ids_LKR, logits_LKR) in enumerate(along):
        first, count = (
            len(row["prompt_tokens"]) - 1,
            len(row["tokens"]),
        )  # the first draft follows the prompt's last token
        here = slice(first, first + count)
        ranks[s, :count] = ranks_LK[here]
        valid[s, : max(0, count - num_heads)] = True  # the last head's target lies K positions further
        prompt, answer = (np.asarray(row[name], dtype=np.int32) for name in ("prompt_tokens", "tokens"))
        recorded.append(AnswerRecord(prompt, answer, ids_LKR[here].astype(np.int32), logits_LKR[here]))
    return Continuations(ranks, valid), recorded


def measure_text(model: HeadRanker, windows: Windows, group: Group) -> np.ndarray:
    """Return the ranks [N, K] of the text's own tokens at positions whose next K + 1 tokens belong to the same
    document. ValueError if there is no such position."""
    ahead = len(model.heads) + 1
    ranks_WLK, *_ = rank_windows(model, windows, group)
    learned = np.lib.stride_tricks.sliding_window_view(windows.learned[:, 1:], ahead, axis=1).all(axis=2)
    found = ranks_WLK[:, :-ahead][learned & (windows.documents[:, ahead:] == windows.documents[:, :-ahead])]
    if not len(found):
        raise ValueError(f"the held-out documents are shorter than the heads' {ahead} tokens: give longer documents")
    return found


def make_model(args: CalibrateOptions, group: Group) -> HeadRanker:
    """Return the backbone and heads in float32, sharded over the ranks."""
    backbone = backbones.load_backbone(args.model, torch.float32)
    vocab_size, hidden_size = backbone.get_output_embeddings().weight.shape
    heads = Heads.load(args.heads, args.model, vocab_size, hidden_size).requires_grad_(False)
    model = HeadRanker(backbone, heads)
    fsdp.shard_parameters(model, model.blocks, [], False, group)
    return model


def compare_with(args: CalibrateOptions, searched: Continuations, measured: Continuations) -> list[dict]:
    """Return one row per tree of --compare, cut to the number of heads, with the tokens per step of a searched tree of
    the same size. ValueError for a tree whose ranks are not measured."""
    rows, num_heads = [], measured.ranks_SPK.shape[-1]
    for source in args.compare:
        tree = load_tree(source, num_heads=1 << 10)
        if tree.num_candidates > NUM_RANKS:
            raise ValueError(
                f"{source} uses rank {tree.num_candidates - 1} but only ranks below {NUM_RANKS} are measured: prune it"
            )
        paths = tree.limited(tree.num_draft_tokens, num_heads).paths()
        best = tree_search.search_walked_tree(searched, len(paths))
        row = {"tree": Path(source).stem, "num_draft_tokens": len(paths)}
        row["num_draft_tokens_before_cut"] = tree.num_draft_tokens
        row["tokens_per_step"] = round(tree_search.tokens_per_step(measured, paths), 4)
        rows.append(row | {"searched": round(tree_search.tokens_per_step(measured, best), 4)})
    return rows


def is_measured(count: int) -> np.ndarray:
    """Return which of ``count`` answers trees are measured on, bool [count]; trees are searched and trained on the
    others."""
    return np.arange(count) % _MEASURED_STRIDE == _MEASURED_STRIDE - 1


def learn_dynamic(recorded: list[AnswerRecord], text: NgramTable) -> tuple[AcceptanceStats, list[dict]]:
    """Train dynamic trees on all answers.

    Returns their acceptance statistics, and tokens per step by number of draft tokens, measured on answers before
    training on them.
    """
    num_heads, measures = recorded[0].ids_PKR.shape[1], is_measured(len(recorded))
    halves = [[r for r, m in zip(recorded, measures, strict=True) if m == is_wanted] for is_wanted in (False, True)]
    rows = []
    for size in DYNAMIC_SIZES:
        drafter = DynamicDrafter(num_heads, size, text=text)
        replay(drafter, halves[False], size)
        rows.append({"num_draft_tokens": size, "tokens_per_step": round(replay(drafter, halves[True], size), 4)})
    return drafter.builder.stats, rows


def result_of(args: CalibrateOptions, own: Continuations, text_NK: np.ndarray) -> dict:
    """Return ``calibration.json``'s content without the results of dynamic trees. ValueError for too few answers."""
    measures = is_measured(len(own.valid_SP))
    searched, measured = own.select(~measures), own.select(measures)
    if not searched.valid_SP.any() or not measured.valid_SP.any():
        raise ValueError(
            f"{len(own.valid_SP)} answers with {own.valid_SP.sum()} positions are too few: give more held-out prompts, "
            "or other prompts if the backbone ends its answers immediately"
        )
    paths = tree_search.search_walked_tree(searched, args.draft_tokens)
    chain = [[0] * depth for depth in range(1, own.ranks_SPK.shape[-1] + 1)]
    return {
        "num_positions": int(own.valid_SP.sum()),
        "accuracy": tree_search.accuracy_by_rank(own.flat()).round(4).tolist(),
        "num_text_positions": len(text_NK),
        "text_accuracy": tree_search.accuracy_by_rank(text_NK).round(4).tolist(),
        "num_searched_positions": int(searched.valid_SP.sum()),
        "num_measured_positions": int(measured.valid_SP.sum()),
        "tree": {
            "num_draft_tokens": len(paths),
            "tokens_per_step": round(tree_search.tokens_per_step(measured, paths), 4),
            "paths": paths,
            "acceptance_probability": [round(p, 4) for p in tree_search.acceptance_probability(measured, paths)],
        },
        "chain": round(tree_search.tokens_per_step(measured, chain), 4),
        "trees": tree_search.compare_trees(searched, measured),
        "compared": compare_with(args, searched, measured),
    }


def run(args: CalibrateOptions, group: Group) -> dict:
    """Measure, search and write the results; returns the content of ``calibration.json``. ValueError for bad input."""
    model = make_model(args, group)
    vocab_size, max_positions = model.vocab_size, model.backbone.config.max_position_embeddings
    learned, held, tokenizer = load_documents(args, vocab_size)
    prompts = answers.select_prompts(held, args.num_prompts, args.prompt_tokens, max_positions)
    own, recorded = measure_answers(args, model, own_answers(args, prompts, group), group)
    windows = pack(held, min(args.length, max_positions), tokenizer.eos_token_id or 0)
    text_NK = measure_text(model, windows.select(windows.spaced_indices(args.text_windows)), group)
    result = result_of(args, own, text_NK)
    with group.agreed():
        if group.is_leader:
            text = NgramTable.of_text(_sample_text([d.tokens for d in learned]))
            acceptance_stats, result["dynamic"] = learn_dynamic(recorded, text)
            _write(Path(args.out), result | {"acceptance_stats": acceptance_stats.to_json()}, text)
    return result


def _sample_text(documents: list[np.ndarray]) -> list[np.ndarray]:
    """Return at most ``_MAX_TEXT_TOKENS`` tokens, from documents in random order."""
    selected: list[np.ndarray] = []
    num_left = _MAX_TEXT_TOKENS
    for index in np.random.default_rng(0).permutation(len(documents)):
        selected.append(documents[index][:num_left].astype(np.int32))
        num_left -= len(selected[-1])
        if not num_left:
            break
    return selected


def _write(out: Path, result: dict, text: NgramTable) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text.save_text(out)
    (out / "calibration.json").write_text(json.dumps(result) + "\n")
    pictures.draw_accuracy(out / "accuracy.png", np.asarray(result["accuracy"]))
    pictures.draw_tree(out / "tree.png", result["tree"]["paths"], result["tree"]["acceptance_probability"])
    (out / "tree.json").write_text(json.dumps(result["tree"]["paths"]) + "\n")
