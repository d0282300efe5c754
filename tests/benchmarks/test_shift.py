"""The benchmark of a changing workload: dynamic trees recover, compared with a fresh calibration."""

import json
import sys

import numpy as np
import pytest
from support import ROOT

from euryale.benchmarks import shift
from euryale.benchmarks.simulate.heads import RANKS

NUM_HEADS, LENGTH, PROMPT, VOCAB = 4, 104, 4, 4096


def record(path, seed: int, rank: int, count: int) -> None:
    """Write answers of random tokens along which every head has the true token at rank ``rank``."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, count * LENGTH).astype(np.int32)
    ids = rng.integers(0, VOCAB, (len(tokens), NUM_HEADS, RANKS)).astype(np.int32)
    for head in range(NUM_HEADS):
        ids[: -2 - head, head, rank] = tokens[2 + head :]
    logits = np.broadcast_to(-np.arange(RANKS, dtype=np.float16) / 8, ids.shape)
    starts, prompts = np.arange(count + 1) * LENGTH, np.full(count, PROMPT)
    np.savez(path, starts=starts, prompts=prompts, tokens=tokens, ids=ids, logits=logits, vocab_size=VOCAB)


def run(tmp_path, monkeypatch, capsys, *flags: str) -> dict:
    record(tmp_path / "first.npz", 1, rank=1, count=8)
    record(tmp_path / "second.npz", 2, rank=0, count=120)
    (tmp_path / "text.jsonl").write_text(json.dumps({"question": "how many clips?", "answer": "72"}) + "\n")
    command = ["shift", "--model", str(ROOT / "demo" / "model"), "--draft-tokens", "4", *flags]
    for name in ("first.npz", "second.npz", "text.jsonl"):
        command += [f"--{name.split('.')[0]}", str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", command)
    shift.main(shift.parser_of_arguments().parse_args())
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_shift_costs_at_first_and_is_recovered_from(tmp_path, monkeypatch, capsys):
    report = run(tmp_path, monkeypatch, capsys, "--edges", "0", "4000")
    assert report["tokens"] == [4000, 2000]
    fresh, served = report["rows"]["fresh calibration"], report["rows"]["served the first workload"]
    assert fresh[1] > 4.5, "four draft tokens, all accepted except some from the n-gram table"
    assert served[0] < fresh[0], "the drafter still expects rank 1"
    # All ranks changed, and statistics of deep draft tokens change only once shallow ones are accepted again.
    assert served[1] > max(0.8 * fresh[1], 1.2 * served[0])


def test_a_short_recording_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="record more prompts"):
        run(tmp_path, monkeypatch, capsys, "--edges", "0", "9000")
