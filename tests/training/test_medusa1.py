"""Medusa-1 end to end on a tiny backbone: what it writes is what the engine serves."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, answer

from euryale.parallel.group import single
from euryale.runtime import checkpoint, heads_format
from euryale.runtime.config import EngineConfig
from euryale.scheduler.params import SamplingParams
from euryale.training import backbone, loop, medusa1
from euryale.training.heads import WEIGHTS_NAME, Heads
from euryale.training.options import Medusa1Options

SIZES = {"num_heads": 3, "length": 64, "batch": 2, "tokens": 64 * 2 * 8.0, "checkpoint_steps": 4, "held_out_windows": 4}
HIDDEN, VOCAB = 32, 384


def options(model_dir, text_file, out, **changes) -> Medusa1Options:
    chosen = {"model": model_dir, "data": (text_file,), "out": str(out), "held_out_percent": 20.0, "lr": 3e-3}
    return Medusa1Options(**chosen | SIZES | {"warmup_steps": 2, "precision": "float32"} | changes)


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
    model = backbone.load_backbone(model_dir, torch.float32, torch.device("cpu"))
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        for head in Heads.like(model.lm_head.weight, 4, 1):
            torch.testing.assert_close(head(hidden), model(tokens).logits)


def test_first_layout(trained, model_dir):
    out, _ = trained
    assert {t.dtype for t in weights(out).values()} == {torch.bfloat16}  # the backbone's
    read = heads_format.load_heads(str(out), checkpoint.Checkpoint(model_dir), HIDDEN, VOCAB)
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
    # Written in bfloat16, so not the same to the last bits: 8 bits of mantissa move a loss of some nats by under 1 %.
    assert found["first"]["head_losses"] == pytest.approx(report["head_losses"], rel=1e-2)


def run_until_killed(args: Medusa1Options) -> None:
    """A real process that is killed once its first checkpoint is whole."""
    flags = []
    for name, value in dataclasses.asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        elif value not in ("", 0, ()):
            flags += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "medusa1", *flags]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    state, deadline = args.out + "/state", time.monotonic() + 90
    while (
        not any(name.startswith("step-") for name in os.listdir(state) if os.path.isdir(state))
        if os.path.isdir(state)
        else True
    ):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_a_killed_training_goes_on_as_if_undisturbed(trained, model_dir, text_file, tmp_path):
    """Bit for bit the weights of the run that was left alone, and every step once in the log."""
    args = options(model_dir, text_file, tmp_path)
    run_until_killed(args)
    assert not (tmp_path / WEIGHTS_NAME).exists(), "killed too late"
    report = medusa1.run(args, single())
    whole = weights(trained[0])
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, whole[name]), name
    assert report["first"] == trained[1]["first"]
    rows = [(r["kind"], int(r["step"])) for r in csv.DictReader((tmp_path / "log.csv").open())]
    assert sorted(rows) == sorted((r["kind"], int(r["step"])) for r in csv.DictReader((trained[0] / "log.csv").open()))


def on_rank(group, args):
    torch.manual_seed(0)
    return medusa1.run(args, group)


def test_two_ranks_train_as_one(trained, ranks, model_dir, text_file, tmp_path):
    """The same windows in the same steps, half of them on each rank. Sums are taken in another order, which AdamW can
    blow up to a whole step where a gradient is next to nothing, so that weights are compared by what they do."""
    args = options(model_dir, text_file, tmp_path, batch=1)
    reports = ranks(2).run(on_rank, args)
    one = trained[1]
    assert reports[0]["steps"] == one["steps"]
    for found, wanted in zip(reports[0]["head_losses"], one["head_losses"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor.float(), weights(trained[0])[name].float(), rtol=0.02, atol=2e-3)


def test_accumulated_gradients_are_those_of_one_batch(trained, model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, batch=1, accumulate=2)
    report = medusa1.run(args, single())
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=1e-4)


def test_stored_hidden_states_train_the_same_heads(trained, model_dir, text_file, tmp_path, caplog):
    caplog.set_level("INFO", "euryale.training")
    report = medusa1.run(options(model_dir, text_file, tmp_path, cache_hidden_states=True), single())
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=1e-4)
    assert re.search(r"hidden states: 0\.0\d GB in .* GB free", caplog.text)
    size = (tmp_path / "hidden_states.bin").stat().st_size
    assert size % (64 * HIDDEN * 4) == 0
    assert size > 0


def test_an_int8_backbone_is_smaller_and_good_enough(trained, model_dir, text_file, tmp_path):
    report = medusa1.run(options(model_dir, text_file, tmp_path, quantize="int8"), single())
    whole = backbone.load_backbone(model_dir, None, torch.device("cpu"))
    # Two bytes a weight become one; of this tiny backbone the embedding, which stays, is a half.
    assert report["backbone_bytes"] < 0.85 * backbone.size_in_bytes(whole) == 0.85 * trained[1]["backbone_bytes"]
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=0.03)
    with pytest.raises(ValueError, match="int4 needs a CUDA GPU"):
        backbone.quantize(whole, "int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 4}, r"3 heads look 4 tokens ahead and windows have 4: raise --length"),
        ({"length": 512}, "more than the 256 tokens"),
        ({"data": ("nowhere",)}, "there is no file nowhere"),
        ({"held_out_percent": 0.0}, "none is held out"),
        ({"model": "nowhere"}, "holds no config.json"),
        ({"num_heads": 0}, "--num-heads must be at least 1"),
        ({"shared_lm_head": True, "num_layers": 0}, "nothing else would be learned"),
        ({"heads": "nowhere"}, "neither medusa_lm_head.safetensors"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(model_dir, text_file, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        medusa1.run(options(model_dir, text_file, tmp_path, **changes), single())


def test_another_training_in_the_same_place_is_refused(trained, model_dir, text_file):
    with pytest.raises(ValueError, match=r"other settings \(--lr\): give another --out"):
        medusa1.run(options(model_dir, text_file, trained[0], lr=1e-2), single())


def test_data_of_another_tokenizer_are_refused(model_dir, tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"prompt_tokens": [1], "tokens": [9999]}) + "\n")
    args = options(model_dir, str(path), tmp_path / "out", held_out=(str(path),))
    with pytest.raises(ValueError, match=r"hold token 9999 but the model's vocabulary has 384"):
        medusa1.run(args, single())


def test_a_full_disk_is_named_and_the_older_checkpoint_kept(model_dir, text_file, tmp_path):
    """The kernel refuses large files in a process of its own, as it does on a full disk."""
    args = options(model_dir, text_file, tmp_path)
    script = (
        "import resource, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import support, torch\n"
        "from euryale.parallel import fsdp\n"
        "from euryale.parallel.group import single\n"
        "model = torch.nn.Linear(200, 200)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "from pathlib import Path\n"
        f"out = Path({str(tmp_path)!r})\n"
        "fsdp.save_checkpoint(out, model, optimizer, 1, single())\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    fsdp.save_checkpoint(out, model, optimizer, 2, single())\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(fsdp.load_checkpoint(out, model, optimizer, single()))\n"
    )
    assert args.out == str(tmp_path)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    message, step = result.stdout.splitlines()[-2:]
    assert "cannot write a checkpoint" in message, result.stderr
    assert "Make room and give the same command again" in message
    assert step == "1"


def test_learning_rate(model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, warmup_steps=10)
    factors = [loop.learning_rate(step, 100, args) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    constant = dataclasses.replace(args, schedule="constant")
    assert {loop.learning_rate(step, 100, constant) for step in range(10, 100)} == {1.0}
