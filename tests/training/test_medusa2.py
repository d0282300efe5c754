"""Medusa-2 on a tiny backbone: both parts learn, and transformers and the engine read the merged checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import answer, oracle_greedy
from transformers import AutoModelForCausalLM

from euryale.parallel import fsdp
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.model import checkpoint, medusa_checkpoint
from euryale.scheduler.sampling_params import SamplingParams
from euryale.training import backbone as backbones
from euryale.training import medusa2
from euryale.training.options import Medusa2Options

SIZES = {"num_heads": 3, "length": 64, "batch": 2, "tokens": 64 * 2 * 8.0, "checkpoint_steps": 8, "held_out_windows": 4}
HIDDEN, VOCAB = 32, 384


def options(model_dir, text_file, out, **changes) -> Medusa2Options:
    fields = {"model": model_dir, "data": (text_file,), "out": str(out), "held_out_percent": 20.0, "lr": 1e-3}
    fields |= {"warmup_steps": 2, "precision": "float32", "head_warmup_steps": 4, "stage_one_lr": 3e-3}
    return Medusa2Options(**fields | SIZES | changes)


@pytest.fixture(scope="module")
def trained(model_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("m2")
    return out, medusa2.run(options(model_dir, text_file, out), single())


def test_both_learn_and_stage_one_comes_first(trained):
    out, report = trained
    stage_one = json.loads((out / "stage-one" / "report.json").read_text())
    # The same heads, rounded to bfloat16 in the files between the stages.
    assert report["first"]["head_losses"] == pytest.approx(stage_one["head_losses"], rel=1e-2)
    assert sum(report["head_losses"]) < sum(report["first"]["head_losses"])
    assert report["backbone_loss"] < report["first"]["backbone_loss"]


def test_merged_checkpoint_serves(trained):
    """transformers reads the backbone and the engine both parts; their greedy answers are equal."""
    out, _ = trained
    read = medusa_checkpoint.load_heads("", checkpoint.Checkpoint(str(out)), HIDDEN, VOCAB)
    assert (read.num_heads, read.num_layers, len(read.lm_heads)) == (3, 1, 3)
    config = json.loads((out / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"], config["dtype"]) == (3, 1, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompts = [np.arange(5, 9 + i, dtype=np.int32) for i in range(3)]
    wanted = [(prompt, SamplingParams(max_tokens=24, ignore_eos=True)) for prompt in prompts]
    found = answer(single(), EngineConfig(model=str(out), dtype="float32", max_model_len=128), wanted)
    for prompt, tokens in zip(prompts, found["outputs"], strict=True):
        assert tokens == oracle_greedy(model, prompt, 24)
    assert (out / "tokenizer.json").read_bytes() == (Path(config_of(out)["model"]) / "tokenizer.json").read_bytes()


def config_of(out) -> dict:
    return json.loads((out / "options.json").read_text())


def test_self_distillation_with_adapters_keeps_the_backbone(trained, model_dir, text_file, tmp_path):
    """At the start student and teacher are equal. The merged weights are the backbone with the written adapters."""
    args = options(
        model_dir,
        text_file,
        tmp_path,
        heads=str(trained[0] / "stage-one"),
        lora_rank=4,
        self_distill=True,
        save_adapters=True,
        labels="backbone",
    )
    report = medusa2.run(args, single())
    before = report["first"]["backbone_loss"]
    assert report["backbone_loss"] == pytest.approx(before, rel=0.01)
    assert sum(report["head_losses"]) < sum(report["first"]["head_losses"])
    rows = (tmp_path / "log.csv").read_text().splitlines()[2:]
    assert float(rows[0].split(",")[3]) == pytest.approx(0, abs=1e-5)  # divergence in the first step
    tokens = torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain = backbones.load_backbone(model_dir, torch.float32)
    adapted = backbones.import_library("peft").PeftModel.from_pretrained(plain, tmp_path / "adapters")
    with torch.no_grad():
        wanted, found = adapted(tokens).logits, merged(tokens).logits
        with adapted.disable_adapter():
            unchanged = adapted(tokens).logits
    # The merged weights are rounded to bfloat16, whose 8 bits of mantissa change logits by less than 2 %.
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert (unchanged - wanted).norm() > 0


def on_rank(group, args):
    torch.manual_seed(0)
    return medusa2.run(args, group)


class Stopped(Exception):
    pass


def on_rank_until_the_first_checkpoint(group, args):
    save = fsdp.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise Stopped

    fsdp.save_checkpoint = save_and_stop
    try:
        medusa2.run(args, group)
    except Stopped:
        return
    finally:
        fsdp.save_checkpoint = save


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_two_ranks_train_as_one(trained, ranks, model_dir, text_file, tmp_path, lora_rank):
    """Two ranks with FSDP run the same windows per step.

    Losses differ by the order of float32 sums, amplified by AdamW's first steps, which are equally large for small
    gradients.
    """
    changes = {"heads": str(trained[0] / "stage-one"), "lora_rank": lora_rank, "self_distill": lora_rank > 0}
    two, one = tmp_path / "two", tmp_path / "one"
    reports = ranks(2).run(on_rank, options(model_dir, text_file, two, batch=1, **changes))
    wanted = medusa2.run(options(model_dir, text_file, one, **changes), single())
    assert reports[0]["backbone_loss"] == pytest.approx(wanted["backbone_loss"], rel=1e-3)
    assert reports[0]["head_losses"] == pytest.approx(wanted["head_losses"], rel=1e-3)
    found, expected = (checkpoint.Checkpoint(str(path)) for path in (two, one))
    assert found.names == expected.names


def test_two_ranks_do_both_stages(ranks, model_dir, text_file, tmp_path):
    report = ranks(2).run(on_rank, options(model_dir, text_file, tmp_path, precision="bfloat16"))[0]
    assert sum(report["head_losses"]) < sum(report["first"]["head_losses"])
    assert (tmp_path / "stage-one" / "report.json").exists()


def test_two_ranks_go_on_as_if_undisturbed(trained, ranks, model_dir, text_file, tmp_path):
    """A training that is stopped at its first checkpoint and resumed gives the bits of an uninterrupted one."""
    changes = {"heads": str(trained[0] / "stage-one"), "batch": 1, "checkpoint_steps": 4}
    resumed, whole = (options(model_dir, text_file, tmp_path / name, **changes) for name in ("resumed", "whole"))
    ranks(2).run(on_rank_until_the_first_checkpoint, resumed)
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    for args in (resumed, whole):
        ranks(2).run(on_rank, args)
    found, wanted = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("resumed", "whole"))
    assert found == wanted


def test_checkpointed_activations_change_nothing(trained, model_dir, text_file, tmp_path):
    changes = {"heads": str(trained[0] / "stage-one"), "gradient_checkpointing": True}
    report = medusa2.run(options(model_dir, text_file, tmp_path, **changes), single())
    assert report["head_losses"] == pytest.approx(trained[1]["head_losses"], rel=1e-4)


def test_a_resumed_training_is_the_undisturbed_one(trained, model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, heads=str(trained[0] / "stage-one"), checkpoint_steps=4)
    on_rank_until_the_first_checkpoint(single(), args)
    medusa2.run(args, single())
    found, wanted = ((path / "model.safetensors").read_bytes() for path in (tmp_path, trained[0]))
    assert found == wanted


def test_head_weight_rises(model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path)
    assert [medusa2.head_weight(step, args) for step in (0, 1, 3, 9)] == pytest.approx([0.05, 0.1, 0.2, 0.2])


def test_self_distillation_needs_adapters(model_dir, text_file, tmp_path):
    with pytest.raises(ValueError, match="need adapters: give --lora-rank"):
        options(model_dir, text_file, tmp_path, self_distill=True)


def test_heads_of_another_size_are_refused(trained, model_dir, text_file, tmp_path):
    args = options(model_dir, text_file, tmp_path, heads=str(trained[0] / "stage-one"), num_heads=2)
    with pytest.raises(ValueError, match="give --num-heads 3 --num-layers 1"):
        medusa2.run(args, single())
