"""Distillation: answers come from the engine, are complete after a kill, and belong to the given prompts."""

import json

import numpy as np
import pytest
import torch
from support import oracle_greedy

from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.scheduler.sampling_params import SamplingParams
from euryale.training import answers, backbone, distill, medusa1
from euryale.training.data import Document, read_pieces, tokenize
from euryale.training.options import DistillOptions, Medusa1Options

SIZES = {"num_prompts": 6, "prompt_tokens": 12, "max_tokens": 10, "max_num_seqs": 4, "held_out_percent": 20.0}


def options(model_dir, text_file, out, **changes) -> DistillOptions:
    fields = {"model": model_dir, "data": (text_file,), "out": str(out), "dtype": "float32"}
    return DistillOptions(**fields | SIZES | changes)


@pytest.fixture(scope="module")
def written(model_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    summary = distill.run(options(model_dir, text_file, out), single())
    assert summary["answers"] == summary["requests"] == 6
    return out


def test_answers_are_the_models_own(written, model_dir):
    model = backbone.load_backbone(model_dir, torch.float32)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        expected = oracle_greedy(model, np.asarray(row["prompt_tokens"]), 10)
        end = expected.index(0) + 1 if 0 in expected else 10
        assert row["tokens"] == expected[:end]


def test_training_reads_what_was_written(written, model_dir, tmp_path):
    tokenizer = load_tokenizer(model_dir)
    documents = tokenize(list(read_pieces((str(written),), tokenizer)), tokenizer, 384)
    assert [len(d.prompt) for d in documents] == [12] * 6
    args = Medusa1Options(model=model_dir, data=(str(written),), out=str(tmp_path), length=24, num_heads=2, batch=1,
                          held_out=(str(written),), tokens=96.0, precision="float32")  # fmt: skip
    assert medusa1.run(args, single())["steps"] == 4


def test_a_killed_run_goes_on_behind_the_last_whole_line(written, model_dir, text_file, tmp_path):
    out = tmp_path / "answers.jsonl"
    lines = written.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:20])
    summary = distill.run(options(model_dir, text_file, out), single())
    assert summary["requests"] == 4  # two answers were complete
    assert out.read_text() == written.read_text()


def test_drawn_answers_depend_on_the_seed_alone(model_dir, text_file, tmp_path):
    found = []
    for number, changes in enumerate(({"seed": 1}, {"seed": 1, "max_num_seqs": 1}, {"seed": 2})):
        out = tmp_path / f"{number}.jsonl"
        distill.run(options(model_dir, text_file, out, temperature=1.0, **changes), single())
        found.append([json.loads(line)["tokens"] for line in out.read_text().splitlines()])
    assert found[0] == found[1] != found[2]
    assert len({tuple(tokens) for tokens in found[0]}) > 1


def test_two_ranks_answer_as_one(written, ranks, model_dir, text_file, tmp_path):
    out = tmp_path / "answers.jsonl"
    ranks(2).run(on_rank, options(model_dir, text_file, out))
    assert out.read_text() == written.read_text()


def on_rank(group, args):
    return distill.run(args, group)


def test_other_settings_or_prompts_are_refused(written, model_dir, text_file, tmp_path):
    with pytest.raises(ValueError, match=r"begun with other settings \(--max-tokens\)"):
        distill.run(options(model_dir, text_file, written, max_tokens=9), single())
    out = tmp_path / "answers.jsonl"
    out.write_text(json.dumps({"prompt_tokens": [1], "tokens": [2]}) + "\n")
    with pytest.raises(ValueError, match="answers other prompts"):
        distill.run(options(model_dir, text_file, out), single())


def test_a_full_disk_is_named(model_dir, text_file):
    """Writing to /dev/full always fails."""
    config = EngineConfig(model=model_dir, tree="off")
    prompts = [np.arange(3, 9, dtype=np.int32)]
    with open("/dev/full", "w") as full, pytest.raises(ValueError, match=r"No space left on device\. Make room"):
        answers.write_answers(config, single(), prompts, SamplingParams(max_tokens=2), full)


def test_prompts_are_the_rows_own_or_pieces_of_text():
    text = [Document(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (5, 3, 40)]
    pieces = answers.select_prompts(text, 4, 4, 100)
    assert all(len(p) == 4 and (np.diff(p) == 1).all() for p in pieces)
    assert [int(p[0]) for p in pieces][1:] == [11, 23, 35]  # from the long one; 3 tokens hold no prompt of 4
    asked = [Document(np.arange(9, dtype=np.int32), np.arange(9) >= 2 + i) for i in range(3)]
    assert [p.tolist() for p in answers.select_prompts(asked, 2, 4, 100)] == [[0, 1], [0, 1, 2, 3]]
    assert [p.tolist() for p in answers.select_prompts(asked, 9, 4, 3)] == [
        [0, 1]
    ]  # the others are too long for the model
    assert len(answers.select_prompts([*asked, Document(np.zeros(0, np.int32), np.zeros(0, bool))], 9, 4, 100)) == 3
    with pytest.raises(ValueError, match="longer than the model's 2 tokens"):
        answers.select_prompts(asked, 4, 4, 2)
    with pytest.raises(ValueError, match="no document has prompts of 50 tokens"):
        answers.select_prompts(text, 4, 50, 100)
