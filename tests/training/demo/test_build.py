"""The command that builds the demo checkpoint, end to end with tiny sizes and a few files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import answer
from transformers import AutoTokenizer, LlamaForCausalLM

from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.tree import load_tree
from euryale.training import calibrate, corpus, medusa1, medusa2
from euryale.training.demo import build as demo
from euryale.training.demo import pretrain
from euryale.training.demo.build import DemoOptions
from euryale.training.tree_search import NUM_RANKS, TREE_SIZES


def size_of(path):
    return path.stat().st_size


@pytest.fixture(scope="module")
def few_files():
    """A small corpus with both sides of the split, instead of the whole standard library."""
    train, held = corpus.split(corpus.standard_library_files())
    small = [p for side, count in ((train, 24), (held, 4)) for p in sorted(side, key=size_of)[len(side) // 2 :][:count]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "standard_library_files", lambda: small)
        yield small


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return DemoOptions(
        out=str(tmp_path_factory.mktemp("demo")),
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        tokens=12 * 4 * 64.0,
        polish_steps=4,
        heads_tokens=12 * 4 * 32.0,
        joint_tokens=6 * 4 * 32.0,
        length=32,
        batch=4,
        num_heads=3,
        draft_tokens=6,
        calibration_prompts=8,
        compile=False,
    )


@pytest.fixture(scope="module")
def built(few_files, options):
    demo.run(options, single())
    return Path(options.out)


def test_result_is_complete(built):
    assert demo.check_size(built) < demo.MAX_BYTES
    assert json.loads((built / "generation_config.json").read_text())["eos_token_id"] == 0
    model = LlamaForCausalLM.from_pretrained(built)
    assert (model.dtype, model.config.num_hidden_layers) == (torch.bfloat16, 2)
    assert model.generation_config.do_sample
    tokenizer = AutoTokenizer.from_pretrained(built)
    text = "def f(x):\n    return 'é'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "# hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_the_engine_serves_it(built):
    """Heads, tree and backbone come from the same directory."""
    wanted = [(np.arange(3, 12, dtype=np.int32), SamplingParams(max_tokens=12, ignore_eos=True))]
    found = answer(single(), EngineConfig(model=str(built)), wanted)
    assert len(found["outputs"][0]) == 12


def test_tree_and_calibration(built, options):
    tree = load_tree(built / "tree.json", options.num_heads)
    assert tree.num_draft_tokens == options.draft_tokens
    calibration = json.loads((built / "calibration.json").read_text())
    assert [len(row) for row in calibration["accuracy"]] == [NUM_RANKS] * options.num_heads
    assert [row["num_draft_tokens"] for row in calibration["trees"]] == list(TREE_SIZES)


def test_model_card_states_what_it_must(built):
    card = (built / "README.md").read_text()
    for words in ("PSF License Version 2", "nats per token", "top-1", "tokens per step", "Rebuild", "--vocab-size 512"):
        assert words in card
    assert "{" not in card.split("## Completions")[0]


def test_finished_stages_are_skipped(built, options, monkeypatch):
    for stage in (pretrain, medusa1, medusa2, calibrate):
        monkeypatch.setattr(stage, "run", lambda *_: pytest.fail("a finished stage ran again"))
    before = (built / "README.md").stat().st_mtime_ns
    demo.run(options, single())
    assert (built / "README.md").stat().st_mtime_ns == before


def test_an_oversized_or_incomplete_result_is_refused(built, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"more than 0: lower"):
        demo.check_size(built)
    with pytest.raises(ValueError, match=r"missing: run the command again"):
        demo.check_size(tmp_path)


def test_a_killed_training_of_the_backbone_goes_on_as_if_undisturbed(options, built, tmp_path, monkeypatch):
    """A run that stops after its first checkpoint and is resumed gives the same bits as an uninterrupted run."""
    monkeypatch.setattr(pretrain, "CHECKPOINT_STEPS", 5)
    args = pretrain.PretrainOptions(**vars(options.for_backbone()) | {"out": str(tmp_path)})

    class Killed(Exception):
        pass

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    save = pretrain.fsdp.save_checkpoint
    monkeypatch.setattr(pretrain.fsdp, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        pretrain.run(args, single())
    monkeypatch.setattr(pretrain.fsdp, "save_checkpoint", save)
    pretrain.run(args, single())
    found, wanted = (path / "model.safetensors" for path in (tmp_path, options.work / "backbone"))
    assert found.read_bytes() == wanted.read_bytes()


def test_the_command_repeats_what_was_asked_for():
    args = DemoOptions(out="x", draft_tokens=9, compile=False)
    assert args.command() == "python launch/train.py demo --out DIR --draft-tokens 9"
    assert args.for_tree().draft_tokens == 9
    assert args.for_joint().model == args.for_heads().model == "x/work/backbone"
