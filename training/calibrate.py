"""Measure trained heads on held-out data and search their static tree (Medusa paper, arXiv 2401.10774, section 2.3.3).

A greedy step accepts a guess when it is what the *backbone* would have written, so trees are searched on the
backbone's own greedy answers to held-out prompts. Accuracies against the held-out text are reported too. Written beside
the heads: ``tree.json``, ``calibration.json``, ``tree.png``, ``accuracy.png``.

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
from euryale.scheduler.params import SamplingParams
from euryale.scheduler.tree import load_tree
from euryale.training import answers, losses, pictures, survival, tree_search
from euryale.training import backbone as backbones
from euryale.training.data import load_documents
from euryale.training.heads import Heads
from euryale.training.model import MedusaModel
from euryale.training.options import CalibrateOptions
from euryale.training.packing import Batch, Windows, pack
from euryale.training.tree_search import NUM_RANKS, Continuations

# Trees are searched on the other answers, so that what is reported of them was not fitted.
_EVERY_NTH_MEASURES = 4


class Ranker(MedusaModel):
    """What the heads say along given tokens."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """At position t and head k the rank of token t + 2 + k, int64 [B, L, K], at most NUM_RANKS (also where there is
        no such token), and the probabilities of the likeliest guesses, float32 [B, L, K, R]."""
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
                guesses.append(logits_BLV.softmax(-1).topk(NUM_RANKS).values)
        return torch.stack(ranks, dim=2), torch.stack(guesses, dim=2)


def own_answers(args: CalibrateOptions, prompts: list[np.ndarray], group: Group) -> list[dict]:
    """The backbone's greedy answers, the same list of ``prompt_tokens`` and ``tokens`` on every rank."""
    config = EngineConfig(
        model=args.model,
        tree="off",
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(512, args.max_num_seqs),
    )
    written = io.StringIO()
    answers.write_answers(config, group, prompts, SamplingParams(max_tokens=args.max_tokens), written)
    content = np.frombuffer(written.getvalue().encode(), dtype=np.uint8).astype(np.int32)
    content = group.broadcast(content if group.is_leader else None).astype(np.uint8)
    rows = [json.loads(line) for line in content.tobytes().decode().split("\n") if line]
    return [row for row in rows if "prompt_tokens" in row]  # a prompt the KV cache cannot hold has an error instead


def rank_windows(model: Ranker, windows: Windows, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Ranks [W, L, K] and probabilities [W, L, K, R] along every window, worked out by all ranks together."""
    count = -(-len(windows) // group.size) * group.size  # FSDP wants every rank to run the model equally often
    ranks, guesses = [], []
    for number in range(count)[group.share(count)]:
        batch = windows.batch(np.asarray([number % len(windows)])).to(group.device)
        for found, part in zip((ranks, guesses), model(batch), strict=True):
            found.append(part[0])
    # Dealt out one by one and stacked rank by rank: [size, count / size, ...] back to the order of the windows.
    whole = (group.all_gather(torch.stack(part)).transpose(0, 1).flatten(0, 1) for part in (ranks, guesses))
    ranks_WLK, guesses_WLKR = (part[: len(windows)].cpu().numpy() for part in whole)
    return ranks_WLK, guesses_WLKR


def as_windows(written: list[dict]) -> Windows:
    """Prompts with their answers, one a window."""
    rows = [row["prompt_tokens"] + row["tokens"] for row in written]
    shape = (len(rows), max(map(len, rows)))
    tokens, is_padding = np.zeros(shape, dtype=np.int32), np.ones(shape, dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], is_padding[i, : len(row)] = row, False
    return Windows(tokens, ~is_padding, is_padding.astype(np.int32))


def measure_answers(args: CalibrateOptions, model: Ranker, written: list[dict], group: Group) -> Continuations:
    """What the heads would have said along the answers."""
    num_heads = len(model.heads)
    shape = (len(written), args.max_tokens, num_heads)
    ranks, guesses = np.full(shape, NUM_RANKS), np.zeros((*shape, NUM_RANKS), dtype=np.float32)
    valid = np.zeros(shape[:2], dtype=bool)
    along = zip(written, *rank_windows(model, as_windows(written), group), strict=True)
    for s, (row, ranks_LK, guesses_LKR) in enumerate(along):
        first, count = len(row["prompt_tokens"]) - 1, len(row["tokens"])  # the prompt's last token guesses first
        ranks[s, :count], guesses[s, :count] = ranks_LK[first : first + count], guesses_LKR[first : first + count]
        valid[s, : max(0, count - num_heads)] = True  # the last of the tokens guessed there lies K further
    return Continuations(ranks, valid, guesses)


def measure_text(model: Ranker, windows: Windows, group: Group) -> np.ndarray:
    """Ranks [N, K] of the text's own tokens, where all those guessed at a position are of its document. ValueError if
    they nowhere are."""
    ahead = len(model.heads) + 1
    ranks_WLK, _ = rank_windows(model, windows, group)
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
        paths = whole.limited(whole.num_drafts, num_heads).paths()
        best = tree_search.search_walked_tree(searched, len(paths))
        row = {"tree": Path(source).stem, "nodes": len(paths), "nodes_before_cut": whole.num_drafts}
        row["tokens_per_step"] = round(tree_search.tokens_per_step(measured, paths), 4)
        rows.append(row | {"searched": round(tree_search.tokens_per_step(measured, best), 4)})
    return rows


def result_of(args: CalibrateOptions, own: Continuations, text_NK: np.ndarray) -> dict:
    """The content of ``calibration.json`` without the survival table."""
    measures = np.arange(len(own.valid_SP)) % _EVERY_NTH_MEASURES == _EVERY_NTH_MEASURES - 1
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
            "survival": [round(share, 4) for share in tree_search.survival(measured, paths)],
        },
        "chain": round(tree_search.tokens_per_step(measured, chain), 4),
        "trees": tree_search.compare_trees(searched, measured),
        "compared": compare_with(args, searched, measured),
    }


def run(args: CalibrateOptions, group: Group) -> dict:
    """Measure, search and write; returns the content of ``calibration.json``. ValueError for bad input."""
    model = make_model(args, group)
    vocab_size, max_positions = model.vocab_size, model.backbone.config.max_position_embeddings
    _, held, tokenizer = load_documents(args, vocab_size)
    prompts = answers.choose_prompts(held, args.num_prompts, args.prompt_tokens, max_positions)
    own = measure_answers(args, model, own_answers(args, prompts, group), group)
    windows = pack(held, min(args.length, max_positions), tokenizer.eos_token_id or 0)
    text_NK = measure_text(model, windows.some(windows.chosen(args.text_windows)), group)
    result = result_of(args, own, text_NK)
    with group.agreed():
        if group.is_leader:
            _write(Path(args.out), result | {"survival": survival.fit(own).to_json()})
    return result


def _write(out: Path, result: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.json").write_text(json.dumps(result) + "\n")
    pictures.draw_accuracy(out / "accuracy.png", np.asarray(result["accuracy"]))
    pictures.draw_tree(out / "tree.png", result["tree"]["paths"], result["tree"]["survival"])
    (out / "tree.json").write_text(json.dumps(result["tree"]["paths"]) + "\n")
