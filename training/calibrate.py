"""Measure trained heads on held-out data and search their static tree (Medusa paper, arXiv 2401.10774, section 2.3.3).

A greedy step accepts a guess when it is what the *backbone* would have written, so trees are searched on the
backbone's own greedy answers to held-out prompts. Accuracies against the held-out text are reported too. Written beside
the heads: ``tree.json``, ``calibration.json``, ``ngrams.safetensors``, ``tree.png``, ``accuracy.png``.

Shape suffixes as in ``tree_search``; B rows, L positions.
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
from euryale.training.model import MedusaModel
from euryale.training.options import CalibrateOptions
from euryale.training.packing import Batch, Windows, pack
from euryale.training.replay import Recorded, replay
from euryale.training.tree_search import NUM_RANKS, Continuations

# Trees are searched on the other answers, so that what is reported of them was not fitted.
_EVERY_NTH_MEASURES = 4
DYNAMIC_SIZES = (8, 16, 63)
_MOST_TEXT = 1_000_000  # tokens that n-grams are counted in


class Ranker(MedusaModel):
    """What the heads say along given tokens."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """At position t and head k the rank of token t + 2 + k, int64 [B, L, K], at most NUM_RANKS (also where there is
        no such token), and the likeliest guesses, int64 [B, L, K, R], with their logits, float32 [B, L, K, R]."""
        hidden_BLD = self.hidden_states(batch)
        ranks, guesses = [], []
        with torch.no_grad():
            for k, head in enumerate(self.heads):
                logits_BLV = self._head_logits(head, hidden_BLD.float()).float()
                wanted_BL = torch.zeros_like(batch.tokens)
                wanted_BL[:, : -2 - k] = batch.tokens[:, 2 + k :]
                rank_BL = losses.rank_of(logits_BLV, wanted_BL).clamp(max=NUM_RANKS)
                rank_BL[:, -2 - k :] = NUM_RANKS
                ranks.append(rank_BL)
                guesses.append(logits_BLV.topk(NUM_RANKS))
        return (
            torch.stack(ranks, dim=2),
            torch.stack([g.indices for g in guesses], dim=2),
            torch.stack([g.values for g in guesses], dim=2),
        )


def own_answers(
    args: CalibrateOptions, prompts: list[np.ndarray], group: Group, temperature: float = 0.0
) -> list[dict]:
    """The backbone's answers, the same list of ``prompt_tokens`` and ``tokens`` on every rank."""
    config = EngineConfig(
        model=args.model,
        tree="off",
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(512, args.max_num_seqs),
    )
    written = io.StringIO()
    answers.write_answers(
        config, group, prompts, SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=0), written
    )
    content = np.frombuffer(written.getvalue().encode(), dtype=np.uint8).astype(np.int32)
    content = group.broadcast(content if group.is_leader else None).astype(np.uint8)
    rows = [json.loads(line) for line in content.tobytes().decode().split("\n") if line]
    return [row for row in rows if "prompt_tokens" in row]  # a prompt the KV cache cannot hold has an error instead


def rank_windows(model: Ranker, windows: Windows, group: Group) -> list[np.ndarray]:
    """What the Ranker says along every window: [W, L, K] and twice [W, L, K, R], worked out by all ranks together."""
    count = -(-len(windows) // group.size) * group.size  # FSDP wants every rank to run the model equally often
    found: tuple[list, list, list] = ([], [], [])
    for number in range(count)[group.own_items(count)]:
        batch = windows.batch(np.asarray([number % len(windows)])).to(group.device)
        for parts, part in zip(found, model(batch), strict=True):
            parts.append(part[0])
    # Dealt out one by one and stacked rank by rank: [size, count / size, ...] back to the order of the windows.
    whole = (group.all_gather(torch.stack(parts)).transpose(0, 1).flatten(0, 1) for parts in found)
    return [part[: len(windows)].cpu().numpy() for part in whole]


def as_windows(written: list[dict]) -> Windows:
    """Prompts with their answers, one a window."""
    rows = [row["prompt_tokens"] + row["tokens"] for row in written]
    shape = (len(rows), max(map(len, rows)))
    tokens, is_padding = np.zeros(shape, dtype=np.int32), np.ones(shape, dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], is_padding[i, : len(row)] = row, False
    return Windows(tokens, ~is_padding, is_padding.astype(np.int32))


def measure_answers(
    args: CalibrateOptions, model: Ranker, written: list[dict], group: Group
) -> tuple[Continuations, list[Recorded]]:
    """What the heads would have said along the answers."""
    num_heads = len(model.heads)
    shape = (len(written), args.max_tokens, num_heads)
    ranks, valid, recorded = np.full(shape, NUM_RANKS), np.zeros(shape[:2], dtype=bool), []
    along = zip(written, *rank_windows(model, as_windows(written), group), strict=True)
    for s, (row, ranks_LK, ids_LKR, logits_LKR) in enumerate(along):
        first, count = len(row["prompt_tokens"]) - 1, len(row["tokens"])  # the prompt's last token guesses first
        here = slice(first, first + count)
        ranks[s, :count] = ranks_LK[here]
        valid[s, : max(0, count - num_heads)] = True  # the last of the tokens guessed there lies K further
        texts = (np.asarray(row[name], dtype=np.int32) for name in ("prompt_tokens", "tokens"))
        recorded.append(Recorded(*texts, ids_LKR[here].astype(np.int32), logits_LKR[here]))
    return Continuations(ranks, valid), recorded


def measure_text(model: Ranker, windows: Windows, group: Group) -> np.ndarray:
    """Ranks [N, K] of the text's own tokens, where all those guessed at a position are of its document. ValueError if
    they nowhere are."""
    ahead = len(model.heads) + 1
    ranks_WLK, *_ = rank_windows(model, windows, group)
    learned = np.lib.stride_tricks.sliding_window_view(windows.learned[:, 1:], ahead, axis=1).all(axis=2)
    found = ranks_WLK[:, :-ahead][learned & (windows.documents[:, ahead:] == windows.documents[:, :-ahead])]
    if not len(found):
        raise ValueError("the held-out documents are shorter than the heads look ahead: give longer ones")
    return found


def make_model(args: CalibrateOptions, group: Group) -> Ranker:
    """Backbone and heads in float32, sharded over the ranks."""
    backbone = backbones.load_backbone(args.model, torch.float32)
    vocab_size, hidden_size = backbone.get_output_embeddings().weight.shape
    heads = Heads.load(args.heads, args.model, vocab_size, hidden_size).requires_grad_(False)
    model = Ranker(backbone, heads, "text", joint=False, distilled=False)
    fsdp.shard_parameters(model, model.blocks, [], False, group)
    return model


def compare_with(args: CalibrateOptions, searched: Continuations, measured: Continuations) -> list[dict]:
    """Rows of the trees of --compare, cut to the depth of the heads, beside the searched ones of as many guesses."""
    rows, num_heads = [], measured.ranks_SPK.shape[-1]
    for source in args.compare:
        whole = load_tree(source, num_heads=1 << 10)
        if whole.num_candidates > NUM_RANKS:
            raise ValueError(f"{source} asks for rank {whole.num_candidates - 1}: ranks below {NUM_RANKS} are measured")
        paths = whole.limited(whole.num_draft_tokens, num_heads).paths()
        best = tree_search.search_walked_tree(searched, len(paths))
        row = {"tree": Path(source).stem, "nodes": len(paths), "nodes_before_cut": whole.num_draft_tokens}
        row["tokens_per_step"] = round(tree_search.tokens_per_step(measured, paths), 4)
        rows.append(row | {"searched": round(tree_search.tokens_per_step(measured, best), 4)})
    return rows


def is_measured(count: int) -> np.ndarray:
    """Which of so many answers trees are measured on, bool; they are searched, and learn, on the others."""
    return np.arange(count) % _EVERY_NTH_MEASURES == _EVERY_NTH_MEASURES - 1


def learn_dynamic(recorded: list[Recorded], text: NgramTable) -> tuple[AcceptanceStats, list[dict]]:
    """What dynamic trees learn of all answers, and tokens per step by number of guesses, measured on answers that they
    had not learned from."""
    num_heads, measures = recorded[0].ids_PKR.shape[1], is_measured(len(recorded))
    halves = [[r for r, m in zip(recorded, measures, strict=True) if m == wanted] for wanted in (False, True)]
    rows = []
    for size in DYNAMIC_SIZES:
        drafter = DynamicDrafter(num_heads, size, text=text)
        replay(drafter, halves[False], size)
        rows.append({"nodes": size, "tokens_per_step": round(replay(drafter, halves[True], size), 4)})
    return drafter.builder.stats, rows


def result_of(args: CalibrateOptions, own: Continuations, text_NK: np.ndarray) -> dict:
    """The content of ``calibration.json`` without what dynamic trees learned."""
    measures = is_measured(len(own.valid_SP))
    searched, measured = own.some(~measures), own.some(measures)
    if not searched.valid_SP.any() or not measured.valid_SP.any():
        raise ValueError(
            f"{len(own.valid_SP)} answers with {own.valid_SP.sum()} positions are too few: give more held-out prompts, "
            "or others if the backbone ends its answers at once"
        )
    paths = tree_search.search_walked_tree(searched, args.nodes)
    chain = [[0] * depth for depth in range(1, own.ranks_SPK.shape[-1] + 1)]
    return {
        "num_positions": int(own.valid_SP.sum()),
        "accuracy": tree_search.accuracy_by_rank(own.flat()).round(4).tolist(),
        "num_text_positions": len(text_NK),
        "text_accuracy": tree_search.accuracy_by_rank(text_NK).round(4).tolist(),
        "num_searched_positions": int(searched.valid_SP.sum()),
        "num_measured_positions": int(measured.valid_SP.sum()),
        "tree": {
            "nodes": len(paths),
            "tokens_per_step": round(tree_search.tokens_per_step(measured, paths), 4),
            "paths": paths,
            "acceptance_probability": [round(p, 4) for p in tree_search.acceptance_probability(measured, paths)],
        },
        "chain": round(tree_search.tokens_per_step(measured, chain), 4),
        "trees": tree_search.compare_trees(searched, measured),
        "compared": compare_with(args, searched, measured),
    }


def run(args: CalibrateOptions, group: Group) -> dict:
    """Measure, search and write; returns the content of ``calibration.json``. ValueError for bad input."""
    model = make_model(args, group)
    vocab_size, max_positions = model.vocab_size, model.backbone.config.max_position_embeddings
    learned, held, tokenizer = load_documents(args, vocab_size)
    prompts = answers.choose_prompts(held, args.num_prompts, args.prompt_tokens, max_positions)
    own, recorded = measure_answers(args, model, own_answers(args, prompts, group), group)
    windows = pack(held, min(args.length, max_positions), tokenizer.eos_token_id or 0)
    text_NK = measure_text(model, windows.some(windows.chosen(args.text_windows)), group)
    result = result_of(args, own, text_NK)
    with group.agreed():
        if group.is_leader:
            text = NgramTable.of_text(_some_text([d.tokens for d in learned]))
            acceptance_stats, result["dynamic"] = learn_dynamic(recorded, text)
            _write(Path(args.out), result | {"acceptance_stats": acceptance_stats.to_json()}, text)
    return result


def _some_text(documents: list[np.ndarray]) -> list[np.ndarray]:
    """At most ``_MOST_TEXT`` tokens, from documents all over the text."""
    kept, room = [], _MOST_TEXT
    for place in np.random.default_rng(0).permutation(len(documents)):
        kept.append(documents[place][:room].astype(np.int32))
        room -= len(kept[-1])
        if not room:
            break
    return kept


def _write(out: Path, result: dict, text: NgramTable) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text.save_text(out)
    (out / "calibration.json").write_text(json.dumps(result) + "\n")
    pictures.draw_accuracy(out / "accuracy.png", np.asarray(result["accuracy"]))
    pictures.draw_tree(out / "tree.png", result["tree"]["paths"], result["tree"]["acceptance_probability"])
    (out / "tree.json").write_text(json.dumps(result["tree"]["paths"]) + "\n")
