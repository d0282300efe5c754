"""The one command that builds the demo checkpoint, end to end with tiny sizes on a few files."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from euryale.scheduler.tree import load_tree
from euryale.training import calibrate, corpus, demo, heads, pretrain


def size_of(path):
    return path.stat().st_size


@pytest.fixture(scope="module")
def few_files():
    """A small corpus with both sides of the split, in place of the whole standard library."""
    files = corpus.standard_library_files()
    train, held = corpus.split(files)
    small = [p for side, count in ((train, 24), (held, 4)) for p in sorted(side, key=size_of)[len(side) // 2 :][:count]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "standard_library_files", lambda: small)
        yield small


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return demo.DemoOptions(
        out=tmp_path_factory.mktemp("demo"),
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        tokens=12 * 4 * 64,
        polish_steps=4,
        batch=4,
        length=64,
        answers=24,
        heads_tokens=12 * 4 * 256,
        heads_batch=4,
        num_heads=3,
        nodes=6,
        prompts=8,
        new_tokens=16,
        compile=False,
    )


@pytest.fixture(scope="module")
def built(few_files, options):
    demo.run(options)
    return options.out


def test_result_is_complete(built, options):
    assert demo.check_size(built) < demo.MAX_BYTES
    assert json.loads((built / "generation_config.json").read_text())["eos_token_id"] == 0
    model = LlamaForCausalLM.from_pretrained(built)
    assert (model.dtype, model.config.num_hidden_layers, model.generation_config.do_sample) == (
        torch.bfloat16,
        2,
        True,
    )
    tokenizer = AutoTokenizer.from_pretrained(built)
    text = "def f(x):\n    return 'é'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "# hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_tree_and_calibration(built, options):
    tree = load_tree(built / "medusa/tree.json", options.num_heads)
    assert tree.num_drafts == options.nodes
    calibration = json.loads((built / "medusa/calibration.json").read_text())
    assert [len(row) for row in calibration["accuracy"]] == [calibrate.NUM_RANKS] * options.num_heads
    assert [row["nodes"] for row in calibration["trees"]] == list(calibrate.TREE_SIZES)
    assert all(1 <= row["tokens_per_step"] <= 1 + options.num_heads for row in calibration["trees"])
    # Answers are cut at the end of text, so there are at most prompts * (new tokens - heads) positions.
    assert 0 < calibration["num_positions"] <= options.prompts * (options.new_tokens - options.num_heads)


def test_model_card_states_what_it_must(built, options):
    card = (built / "README.md").read_text()
    for words in ("PSF License Version 2", "nats per token", "top-1", "tokens per step", "Rebuild", "--vocab-size 512"):
        assert words in card
    assert "{" not in card.split("## Greedy completions")[0]


def test_finished_stages_are_skipped(built, options, monkeypatch):
    for stage in (pretrain, heads, calibrate):
        monkeypatch.setattr(stage, "run", lambda _: pytest.fail("a finished stage ran again"))
    before = (built / "README.md").stat().st_mtime_ns
    demo.run(options)
    assert (built / "README.md").stat().st_mtime_ns == before


def test_an_oversized_or_incomplete_result_is_refused(built, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"more than 0: lower"):
        demo.check_size(built)
    with pytest.raises(ValueError, match=r"missing: run the command again"):
        demo.check_size(tmp_path)


def test_killed_training_of_heads_goes_on_as_if_undisturbed(built, options, few_files, tmp_path, monkeypatch):
    """Stop after the first checkpoint, start again: bit for bit the heads of the undisturbed run."""
    monkeypatch.setattr(pretrain, "CHECKPOINT_STEPS", 5)
    whole = heads.Heads.load(built / "medusa").state_dict()
    for name in demo.RESULT:
        if "/" not in name:
            (tmp_path / name).write_bytes((built / name).read_bytes())
    args = demo.DemoOptions(**(vars(options) | {"out": tmp_path})).for_heads()

    class Killed(Exception):
        pass

    def save_and_die(*args):
        save(*args)
        raise Killed

    save = pretrain.save_checkpoint
    monkeypatch.setattr(pretrain, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        heads.run(args)
    assert torch.load(tmp_path / "work/heads.pt", weights_only=True)["step"] == 5
    assert not (tmp_path / demo.HEADS_FILE).exists()
    monkeypatch.setattr(pretrain, "save_checkpoint", save)
    heads.run(args)
    for name, tensor in heads.Heads.load(tmp_path / "medusa").state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_flags_come_from_the_options(monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo", "--out", "x", "--heads-tokens", "5e3", "--no-compile"])
    options = pretrain.options_from_flags(demo.DemoOptions, "")
    assert (str(options.out), options.for_heads().tokens, options.compile) == ("x", 5000, False)
    assert options.for_tree() == calibrate.CalibrateOptions(model=options.out)
    assert options.for_backbone() == pretrain.PretrainOptions(out=options.out, compile=False)
    monkeypatch.setattr("sys.argv", ["demo"])
    with pytest.raises(SystemExit):
        pretrain.options_from_flags(demo.DemoOptions, "")
