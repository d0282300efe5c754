"""Medusa-1 end to end on a tiny backbone: the engine serves the written heads."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, answer

from euryale.parallel import fsdp
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.model import checkpoint, medusa_checkpoint
from euryale.scheduler.sampling_params import SamplingParams
from euryale.training import backbone, loop, losses, medusa1
from euryale.training.heads import WEIGHTS_NAME, Heads
from euryale.training.hidden_states import StoredHiddenStates
from euryale.training.options import Medusa1Options

SIZES = {"num_heads": 3, "length": 64, "batch": 2, "tokens": 64 * 2 * 8.0, "checkpoint_steps": 4, "held_out_windows": 4}
HIDDEN, VOCAB = 32, 384


def options(model_dir, text_file, out, **changes) -> Medusa1Options:
    fields = {"model": model_dir, "data": (text_file,), "out": str(out), "held_out_percent": 20.0, "lr": 3e-3}
    return Medusa1Options(**fields | SIZES | {"warmup_steps": 2, "precision": "float32"} | changes)


def weights(out) -> dict:
    return load_file(out / WEIGHTS_NAME)


@pytest.fixture(scope="module")
def trained(model_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("m1")
    return out, medusa1.run(options(model_dir, text_file, out), single())


def test_heads_learn_and_everything_is_written(trained):
    out, report = trained
    assert report["steps"] == 8
    assert sum(report["head_losses"]) < sum(report["first"]["head_losses"])
    assert report["backbone_loss"] == report["first"]["backbone_loss"]  # frozen
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(r["step"]) for r in rows if r["kind"] == "train"] == list(range(1, 9))
    assert [int(r["step"]) for r in rows if r["kind"] == "held-out"] == [0, 4, 8]


def test_fresh_heads_say_what_the_backbone_says(model_dir):
    model = backbone.load_backbone(model_dir, torch.float32)
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        for head in Heads.like(model.lm_head.weight, 4, 1):
            torch.testing.assert_close(head(hidden), model(tokens).logits)


def test_first_layout(trained, model_dir):
    out, _ = trained
    assert {t.dtype for t in weights(out).values()} == {torch.bfloat16}  # the backbone's
    read = medusa_checkpoint.load_heads(str(out), checkpoint.Checkpoint(model_dir), HIDDEN, VOCAB)
    assert (read.num_heads, read.num_layers, len(read.lm_heads)) == (3, 1, 3)
    config = json.loads((out / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, 1)
    assert (out / config["base_model_name_or_path"]).resolve().samefile(model_dir)


def test_second_layout_shares_the_lm_head(model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, shared_lm_head=True, num_layers=2, labels="backbone")
    report = medusa1.run(args, single())
    assert sum(report["head_losses"]) < sum(report["first"]["head_losses"])
    assert all(".linear." in name for name in weights(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["version"] == "2"
    heads = Heads.load(str(tmp_path), model_dir, VOCAB, HIDDEN)
    assert (len(heads), heads.num_layers, heads.has_lm_heads) == (3, 2, False)
    config = EngineConfig(model=model_dir, medusa=str(tmp_path), dtype="float32", tree="chain")
    found = answer(single(), config, [(np.arange(3, 30, dtype=np.int32), SamplingParams(max_tokens=30))])
    assert len(found["outputs"][0]) == 30 or found["reasons"] == ["stop"]


def test_training_can_start_from_trained_heads(trained, model_dir, text_file, tmp_path):
    out, report = trained
    found = medusa1.run(options(model_dir, text_file, tmp_path, heads=str(out)), single())
    # The heads were rounded to bfloat16: 8 bits of mantissa change a loss of a few nats by less than 1 %.
    assert found["first"]["head_losses"] == pytest.approx(report["head_losses"], rel=1e-2)


def run_until_killed(args: Medusa1Options) -> None:
    """Run the training in a process that is killed after its first checkpoint."""
    flags = []
    for name, value in dataclasses.asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        elif value not in ("", 0, ()):
            flags += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "medusa1", *flags]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while fsdp.latest_checkpoint(Path(args.out, "state")) is None:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    process.stderr.close()


def test_a_killed_training_goes_on_as_if_undisturbed(model_dir, text_file, tmp_path):
    """The weights equal those of an uninterrupted run bit for bit, and the log holds every step once."""
    whole = options(model_dir, text_file, tmp_path / "whole", tokens=64 * 2 * 40.0)
    killed = dataclasses.replace(whole, out=str(tmp_path / "killed"))
    run_until_killed(killed)
    assert not (tmp_path / "killed" / WEIGHTS_NAME).exists(), "killed too late"
    reports = [medusa1.run(args, single()) for args in (whole, killed)]
    wanted = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "killed").items():
        assert torch.equal(tensor, wanted[name]), name
    assert reports[0]["first"] == reports[1]["first"]
    logs = [csv.DictReader((tmp_path / name / "log.csv").open()) for name in ("whole", "killed")]
    steps = [sorted((row["kind"], int(row["step"])) for row in log) for log in logs]
    assert steps[0] == steps[1]


def on_rank(group, args, chunk=1 << 26):
    losses._CHUNK = chunk
    try:
        return medusa1.run(args, group)
    finally:
        losses._CHUNK = 1 << 26


@pytest.mark.parametrize("chunk", [1 << 26, 50 * VOCAB])
def test_two_ranks_train_as_one(trained, ranks, model_dir, text_file, tmp_path, chunk):
    """Each rank has half of the windows, with losses in one piece or in recomputed chunks.

    Sums in another order change a loss by 1e-6, which eight steps of AdamW may amplify.
    """
    args = options(model_dir, text_file, tmp_path, batch=1)
    reports = ranks(2).run(on_rank, args, chunk)
    one = trained[1]
    assert reports[0]["steps"] == one["steps"]
    assert reports[0]["head_losses"] == pytest.approx(one["head_losses"], rel=1e-4)
    assert reports[1] == {}


@pytest.mark.parametrize(
    "changes", [{"quantization": "int8"}, {"cache_hidden_states": True}, {"precision": "bfloat16"}]
)
def test_two_ranks_learn_in_every_mode(ranks, model_dir, text_file, tmp_path, changes):
    report = ranks(2).run(on_rank, options(model_dir, text_file, tmp_path, **changes))[0]
    assert sum(report["head_losses"]) < sum(report["first"]["head_losses"]) - 0.1


def test_accumulated_gradients_are_those_of_one_batch(trained, model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, batch=1, accumulate=2)
    report = medusa1.run(args, single())
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=1e-4)


def test_stored_hidden_states_train_the_same_heads(trained, model_dir, text_file, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "euryale.training")
    args = options(model_dir, text_file, tmp_path, cache_hidden_states=True)
    report = medusa1.run(args, single())
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=1e-4)
    assert re.search(r"hidden states: 0\.0\d GB in .* GB free", caplog.text)
    assert (tmp_path / "hidden_states.bin").stat().st_size % (64 * HIDDEN * 4) == 0
    # A complete file is reused, unless the data differ.
    fills = []
    monkeypatch.setattr(StoredHiddenStates, "_fill", lambda self, training: fills.append(len(training.windows)))
    shutil.rmtree(tmp_path / "state")
    medusa1.run(args, single())
    assert not fills
    shutil.rmtree(tmp_path / "state")
    medusa1.run(dataclasses.replace(args, held_out_percent=80.0), single())
    assert len(fills) == 1


def test_hidden_states_that_do_not_fit_are_refused(model_dir, text_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ValueError, match=r"hidden states need 0\.0\d GB .* No space left .*: leave out --cache"):
        medusa1.run(options(model_dir, text_file, tmp_path, cache_hidden_states=True), single())
    assert not (tmp_path / "hidden_states.bin").exists()


def test_an_int8_backbone_is_smaller_and_good_enough(trained, model_dir, text_file, tmp_path):
    report = medusa1.run(options(model_dir, text_file, tmp_path, quantization="int8"), single())
    whole = backbone.load_backbone(model_dir, None)
    # Two bytes per weight become one, except in the embedding, which is half of this tiny backbone.
    assert report["backbone_bytes"] < 0.85 * backbone.size_in_bytes(whole) == 0.85 * trained[1]["backbone_bytes"]
    # Weights change by up to 1/254 of a row's largest, which changes hidden states by about 1 %.
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=0.03)
    with pytest.raises(ValueError, match="int4 needs a CUDA GPU"):
        backbone.quantize(whole, "int4", torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 4}, r"3 heads look 4 tokens ahead and windows have 4: raise --length"),
        ({"length": 512}, "exceeds the model's 256 positions"),
        ({"data": ("nowhere",)}, "there is no file nowhere"),
        ({"held_out_percent": 0.0}, "none is held out"),
        ({"model": "nowhere"}, "holds no config.json"),
        ({"num_heads": 0}, "--num-heads must be a whole number of heads from 1 to 64, not 0"),
        ({"shared_lm_head": True, "num_layers": 0}, "the heads would have no parameters"),
        ({"heads": "nowhere"}, "neither medusa_lm_head.safetensors"),
        ({"clip": 0.0}, "--clip must be a number above 0"),
        ({"lr": float("nan")}, "--lr must be a number above 0 and at most 1e.38, not nan"),
        ({"tokens": -5.0}, "--tokens must be a number of tokens from 0"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(model_dir, text_file, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        medusa1.run(options(model_dir, text_file, tmp_path, **changes), single())


def test_a_diverging_training_is_stopped(model_dir, text_file, tmp_path):
    with pytest.raises(ValueError, match=r"not finite at step \d: lower --lr"):
        medusa1.run(options(model_dir, text_file, tmp_path, lr=1e30, warmup_steps=0), single())
    assert not (tmp_path / WEIGHTS_NAME).exists()


def test_another_training_in_the_same_place_is_refused(trained, model_dir, text_file):
    with pytest.raises(ValueError, match=r"other settings \(--lr\): give those, or another --out"):
        medusa1.run(options(model_dir, text_file, trained[0], lr=1e-2), single())
    with pytest.raises(ValueError, match=r"\(--batch times --accumulate times ranks\)"):
        medusa1.run(options(model_dir, text_file, trained[0], batch=1), single())
    # The same number of windows per step in other batches: the same training, which is complete.
    assert medusa1.run(options(model_dir, text_file, trained[0], batch=1, accumulate=2), single())["steps"] == 8


def test_a_mistake_can_be_mended_in_the_same_place(model_dir, text_file, tmp_path):
    with pytest.raises(ValueError, match="there is no file nowhere"):
        medusa1.run(options(model_dir, "nowhere", tmp_path), single())
    assert medusa1.run(options(model_dir, text_file, tmp_path), single())["steps"] == 8


def test_data_of_another_tokenizer_are_refused(model_dir, tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"prompt_tokens": [1], "tokens": [9999]}) + "\n")
    args = options(model_dir, str(path), tmp_path / "out", held_out=(str(path),))
    with pytest.raises(ValueError, match=r"hold token 9999 but the model's vocabulary has 384"):
        medusa1.run(args, single())


def test_learning_rate(model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, warmup_steps=10)
    factors = [loop.learning_rate_factor(step, 100, args) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    constant = dataclasses.replace(args, schedule="constant")
    assert {loop.learning_rate_factor(step, 100, constant) for step in range(10, 100)} == {1.0}
