"""Calibration on a tiny backbone: ranks by definition, files that the engine reads, the same on two ranks."""

import json

import numpy as np
import pytest
import torch
from support import answer

from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.speculation.ngram_table import NgramTable
from euryale.scheduler.speculation.tree import load_tree
from euryale.training import backbone, calibrate, medusa1
from euryale.training.data import Document, load_documents
from euryale.training.heads import Heads
from euryale.training.options import CalibrateOptions, Medusa1Options
from euryale.training.packing import pack
from euryale.training.replay import replay
from euryale.training.tree_search import NUM_RANKS

HIDDEN, VOCAB, NUM_HEADS = 32, 384, 3


@pytest.fixture(scope="module")
def heads_dir(model_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("heads")
    args = Medusa1Options(model=model_dir, data=(text_file,), out=str(out), num_heads=NUM_HEADS, length=64, batch=2,
                          tokens=64 * 2 * 60, held_out_percent=20.0, labels="backbone", lr=5e-3,
                          held_out_windows=2)  # fmt: skip
    medusa1.run(args, single())
    return str(out)


def options(model_dir, text_file, heads_dir, out, **changes) -> CalibrateOptions:
    fields = {"model": model_dir, "data": (text_file,), "heads": heads_dir, "out": str(out), "held_out_percent": 20.0}
    fields |= {
        "dtype": "float32",
        "draft_tokens": 6,
        "num_prompts": 8,
        "prompt_tokens": 12,
        "max_tokens": 16,
        "text_windows": 4,
        "length": 64,
    }
    return CalibrateOptions(**fields | changes)


@pytest.fixture(scope="module")
def calibrated(model_dir, text_file, heads_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration")
    (out / "published.json").write_text("[[0], [1], [2], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    args = options(model_dir, text_file, heads_dir, out, compare=(str(out / "published.json"),))
    return out, calibrate.run(args, single())


def test_ranks_are_positions_among_the_sorted_logits(model_dir, text_file, heads_dir, tmp_path):
    args = options(model_dir, text_file, heads_dir, tmp_path)
    model = calibrate.make_model(args, single())
    rows = [np.random.default_rng(0).integers(0, VOCAB, n).astype(np.int32) for n in (20, 13)]
    windows = pack(
        [Document(row, np.ones(len(row), bool)) for row in rows], 40, 0
    )  # both in one window, without attention to each other
    along = [part[0] for part in calibrate.rank_windows(model, windows, single())]
    found = [[part[a:b] for part in along] for a, b in ((0, 20), (20, 33))]
    plain = backbone.load_backbone(model_dir, torch.float32)
    heads = Heads.load(heads_dir, model_dir, VOCAB, HIDDEN)
    for row, (ranks, ids, logits) in zip(rows, found, strict=True):
        assert ranks.shape == (len(row), NUM_HEADS)
        assert ids.shape == logits.shape == (len(row), NUM_HEADS, NUM_RANKS)
        with torch.no_grad():
            hidden = plain.model(torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0]
            for k, head in enumerate(heads):
                all_logits = head(hidden)
                torch.testing.assert_close(
                    torch.from_numpy(logits[:, k]), all_logits.sort(-1, descending=True).values[:, :NUM_RANKS]
                )
                torch.testing.assert_close(
                    all_logits.gather(1, torch.from_numpy(ids[:, k])), torch.from_numpy(logits[:, k])
                )
                for t in range(len(row) - 2 - k):
                    rank = all_logits[t].argsort(descending=True).tolist().index(int(row[t + 2 + k]))
                    assert ranks[t, k] == min(rank, NUM_RANKS)  # random weights have no ties


def test_files_beside_the_heads(calibrated):
    out, result = calibrated
    tree = load_tree(out / "tree.json", NUM_HEADS)
    assert tree.num_draft_tokens == 6
    written = json.loads((out / "calibration.json").read_text())
    assert written["tree"]["paths"] == tree.paths() == result["tree"]["paths"]
    assert [len(row) for row in written["accuracy"]] == [NUM_RANKS] * NUM_HEADS
    learned = AcceptanceStats.from_json(written["acceptance_stats"], NUM_HEADS)
    assert not np.array_equal(learned.ratios, AcceptanceStats(NUM_HEADS).ratios)
    with pytest.raises(ValueError, match=r"acceptance_stats.accepted must be .* numbers .* for 2 heads"):
        AcceptanceStats.from_json(written["acceptance_stats"], NUM_HEADS - 1)
    assert NgramTable.load_text(out, 1 << 20).rows["total"].any()
    assert [row["num_draft_tokens"] for row in written["dynamic"]] == list(calibrate.DYNAMIC_SIZES)
    assert all(1 <= row["tokens_per_step"] <= 1 + NUM_HEADS for row in written["trees"])
    assert [row["num_draft_tokens"] for row in written["compared"]] == [5]  # the fourth head's draft token is cut off
    assert written["compared"][0]["num_draft_tokens_before_cut"] == 6
    for name in ("tree.png", "accuracy.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_engine_takes_the_steps_of_the_walk(calibrated, model_dir, text_file, heads_dir):
    """Real decoding with the searched tree takes the same steps as the walk over the same answers, wherever all heads'
    targets lie within the answer."""
    out, _ = calibrated
    args = options(model_dir, text_file, heads_dir, out)
    model = calibrate.make_model(args, single())
    documents = load_documents(args, VOCAB)[1]
    prompts = calibrate.answers.select_prompts(documents, 8, 12, 256)
    written = calibrate.own_answers(args, prompts, single())
    own, _ = calibrate.measure_answers(args, model, written, single())
    paths = load_tree(out / "tree.json", NUM_HEADS).paths()
    walked = calibrate.tree_search.num_accepted_tokens(own.ranks_SPK, paths)
    starts = calibrate.tree_search.step_starts(own, paths)
    config = EngineConfig(model=model_dir, medusa=heads_dir, tree=str(out / "tree.json"), dtype="float32")
    found = answer(single(), config, [(p, SamplingParams(max_tokens=16)) for p in prompts])
    assert [row["tokens"] for row in written] == found["outputs"]
    for s, accepted in enumerate(found["tokens_per_step"]):
        wanted = (1 + walked[s][starts[s]]).tolist()
        assert accepted[1 : 1 + len(wanted)] == wanted  # the first step ends the prompt, the last ones the answer
    assert walked[starts].sum() > 10  # the heads were trained on this backbone, so that some draft tokens are accepted


def test_the_engine_takes_the_steps_of_the_replay(model_dir, text_file, heads_dir, tmp_path):
    """Real decoding with dynamic trees of a fixed size takes the same steps as the replay of the recorded answers,
    request by request."""
    args = options(model_dir, text_file, heads_dir, tmp_path)
    model = calibrate.make_model(args, single())
    asked = calibrate.answers.select_prompts(load_documents(args, VOCAB)[1], 8, 12, 256)
    written = calibrate.own_answers(args, asked, single())
    _, recorded = calibrate.measure_answers(args, model, written, single())
    drafter, taken = DynamicDrafter(NUM_HEADS, 6), []
    for record in recorded:
        taken.append(replay(drafter, [record], 6))
    config = EngineConfig(
        model=model_dir, medusa=heads_dir, tree="dynamic:6", dtype="float32", max_num_seqs=1, draft_from_text=False
    )
    found = answer(single(), config, [(p, SamplingParams(max_tokens=16)) for p in asked])
    assert [row["tokens"] for row in written] == found["outputs"]
    means = [np.mean(accepted[1:-1]) if accepted[1:-1] else np.nan for accepted in found["tokens_per_step"]]
    np.testing.assert_allclose(taken, means)
    assert np.nanmax(means) > 1, "some draft token was accepted"


def test_two_ranks_measure_the_same(calibrated, ranks, model_dir, text_file, heads_dir, tmp_path):
    """Sums in another order may change ranks at ties, which few of the thousands of positions have."""
    result = ranks(2).run(on_rank, options(model_dir, text_file, heads_dir, tmp_path))[0]
    assert np.abs(np.asarray(result["accuracy"]) - np.asarray(calibrated[1]["accuracy"])).max() < 0.02
    assert result["num_positions"] == calibrated[1]["num_positions"]
    assert (tmp_path / "tree.json").exists()


def on_rank(group, args):
    return calibrate.run(args, group)


def test_answers_end_at_the_end_of_text(model_dir, text_file, heads_dir, tmp_path):
    args = options(model_dir, text_file, heads_dir, tmp_path)
    model = calibrate.make_model(args, single())
    written = [{"prompt_tokens": [5, 6, 7], "tokens": list(range(10, 10 + n))} for n in (16, 7, 2)]
    measured, _ = calibrate.measure_answers(args, model, written, single())
    # Position 0 predicts new tokens 1, 2, 3; of 7 tokens the last three are predicted at position 3.
    assert measured.valid_SP.sum(axis=1).tolist() == [13, 4, 0]
    assert measured.ranks_SPK.shape == (3, 16, NUM_HEADS)


def test_trees_with_unmeasured_ranks_and_too_few_prompts_are_refused(model_dir, text_file, heads_dir, tmp_path):
    (tmp_path / "wide.json").write_text("[[10]]")
    args = options(model_dir, text_file, heads_dir, tmp_path, compare=(str(tmp_path / "wide.json"),))
    with pytest.raises(ValueError, match="uses rank 10 but only ranks below 10 are measured"):
        calibrate.run(args, single())
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "import os"}\n{"prompt": "' + "x = 1 " * 300 + '"}\n')  # the second is too long
    args = options(model_dir, text_file, heads_dir, tmp_path, held_out=(str(asked), text_file))
    with pytest.raises(ValueError, match=r"1 answers with .* are too few: give more held-out prompts"):
        calibrate.run(args, single())


def test_missing_heads_and_bad_sizes_are_refused(model_dir, text_file, tmp_path):
    with pytest.raises(ValueError, match="has no Medusa heads in it"):
        calibrate.run(options(model_dir, text_file, "", tmp_path), single())
    with pytest.raises(ValueError, match="--draft-tokens must be a whole number from 1 to 127"):
        options(model_dir, text_file, "", tmp_path, draft_tokens=200)
