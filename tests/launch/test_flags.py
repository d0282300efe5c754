"""The flags of every command: each states its meaning, unit and default, and refuses bad values."""

import argparse
import importlib.util
import re

import pytest
from support import ROOT, run_script

from euryale.frontend.config import FrontEndConfig
from euryale.runtime.config import EngineConfig
from euryale.runtime.flags import FlagParser


def command(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsers() -> list[argparse.ArgumentParser]:
    found = [command(name).parser() for name in ("serve", "generate")]
    training = command("train").parser()
    subcommands = next(a for a in training._actions if isinstance(a, argparse._SubParsersAction))
    return [*found, *subcommands.choices.values()]


PARSERS = parsers()
FLAGS = [(p.prog, action) for p in PARSERS for action in p._actions if action.dest != "help"]


@pytest.mark.parametrize(("prog", "action"), FLAGS, ids=lambda part: getattr(part, "dest", None))
def test_every_flag_says_what_it_is_and_its_default(prog, action):
    text = action.help or ""
    default = re.search(r" \(default: (.+)\)$", text)
    assert default or text.endswith(" (required)"), text
    assert 20 <= len(text) <= 260, text
    assert text[0].islower() or text.startswith(("JSONL", "Medusa", "GiB")), text
    if default and action.default in (None, "", 0, 0.0, ()) and not isinstance(action.default, bool):
        has_words = re.search("[a-z]{2}", default[1])
        assert has_words or action.dest in ("seed", "min_tokens"), f"what does {default[1]} mean?"
    if default and isinstance(action.default, bool) and isinstance(action, argparse.BooleanOptionalAction):
        assert default[1] == ("on" if action.default else "off")


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_flags_stand_in_groups_and_the_help_can_be_read(parser):
    ungrouped = [a.dest for a in parser._optionals._group_actions if a.dest != "help"]
    assert set(ungrouped) <= {"served_model_name", "no_speculation"}
    groups = [group for group in parser._action_groups if group._group_actions]
    assert all(len(group._group_actions) <= 16 for group in groups)
    assert all(not re.search("[A-Z][a-z]+[A-Z]", group.title) for group in groups), "a topic, not a class"
    text = parser.format_help()
    assert text.startswith(f"usage: {parser.prog} FLAGS\n")
    assert max(map(len, text.splitlines())) <= 120


NUMBERS = {
    EngineConfig: [f for f in EngineConfig.__dataclass_fields__.values() if type(f.default) in (int, float)],
    FrontEndConfig: [f for f in FrontEndConfig.__dataclass_fields__.values() if type(f.default) in (int, float)],
}


@pytest.mark.parametrize(
    ("config", "field"), [(c, f) for c, fields in NUMBERS.items() for f in fields], ids=lambda x: getattr(x, "name", "")
)
def test_every_number_has_a_range(config, field):
    base = {"model": "m"} if config is EngineConfig else {}
    for value in (-1, float("nan"), float("inf"), 10**30, "5", None, True):
        with pytest.raises(ValueError, match=rf"^--{field.name.replace('_', '-')} must be .*, not ") as caught:
            config(**base | {field.name: value})
        assert len(str(caught.value)) < 300


FILES = ["--model", "none", "--prompts", "none", "--out", "none"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("serve", ["--nonsense", "3"], "error: unrecognized arguments: --nonsense 3"),
        ("serve", ["--max-num-seqs", "many"], "error: --max-num-seqs must be a whole number, not 'many'"),
        ("serve", ["--max-num-seqs", "0", "--model", "m"], "error: --max-num-seqs must be a whole number of requests"),
        ("serve", ["--dtype", "int3"], "error: argument --dtype: invalid choice: 'int3'"),
        ("serve", [], "error: --model is missing: give the directory of the backbone"),
        ("serve", ["--model", "none"], "error: none holds no config.json"),
        ("generate", ["--prompts", "x"], "error: the following arguments are required: --out"),
        ("generate", [*FILES, "--seed", str(2**64)], f"error: --seed must be a whole number from 0 to {2**64 - 1}"),
        ("generate", [*FILES, "--samples", "0"], "error: --samples must be a whole number of samples from 1"),
        ("generate", [*FILES, "--temperature", "nan"], "error: --temperature must be 0 (greedy) or a number"),
        ("generate", [*FILES, "--top-p", "x"], "error: --top-p must be a number, not 'x'"),
        ("train", ["medusa1"], "error: --model is missing: give the directory of the backbone"),
        ("train", ["distill", "--batch", "3"], "error: unrecognized arguments: --batch 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_command_is_one_line(script, arguments, message):
    done = run_script(ROOT / "launch" / f"{script}.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("rank", "code"), [("0", 2), ("1", 0)])
def test_one_rank_of_a_host_speaks_for_all(monkeypatch, capsys, rank, code):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as caught:
        FlagParser(prog="any.py").parse_args(["--nonsense"])
    assert caught.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if rank == "0" else 0)
