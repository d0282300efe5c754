"""``launch/generate.py`` under torchrun: files in, files out, results on the last line."""

import json
import subprocess
import sys

import pytest
import textbook
from support import ROOT, family_config, head_tensors, make_model, oracle_greedy, prompts, run_script, save_heads
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from euryale.scheduler.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("offline")
    made = make_model(directory, family_config("llama"))
    save_heads(directory / "medusa", head_tensors(made))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 5, "two": 6}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory, made


def generate(model, tmp_path, lines: list[str], size: int, *flags: str) -> tuple[list[dict], dict]:
    """Run it on several ranks under torchrun, or on one without; returns answers and results."""
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    script = ROOT / "launch" / "generate.py"
    command = ["--model", str(model[0]), "--medusa", str(model[0] / "medusa"), "--dtype", "float32", *flags]
    command += ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    if size == 1:
        done = run_script(script, *command)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), str(script), *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd="/")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    return rows, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("size", "flags"), [(1, ("--no-speculation",)), (2, ("--max-num-seqs", "2", "--loop", "overlapped"))]
)
def test_answers_in_input_order_and_errors_in_their_place(model, tmp_path, size, flags):
    asked = prompts(5)
    lines = [json.dumps({"id": f"p{i}", "prompt_tokens": p.tolist(), "max_tokens": 4 + i}) for i, p in enumerate(asked)]
    lines[3:3] = ["{", '{"id": "e"}', '{"id": "f", "prompt": ""}', '{"id": "g", "prompt": "one two", "max_tokens": 0}']
    lines += [
        '{"id": "h", "prompt": "one two\u2028one"}',
        '{"id": "i", "prompt_tokens": [9999]}',
        '{"id": "j", "prompt": 3}',
        '{"id": "\\ud800", "prompt": "one \\ud800"}',
    ]
    rows, summary = generate(model, tmp_path, lines, size, "--max-tokens", "7", "--ignore-eos", *flags)
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", None, "e", "f", "g", "p3", "p4", "h", "i", "j", "\ud800"]
    by_id = {row["id"]: row for row in rows}
    for i, prompt in enumerate(asked):
        row = by_id[f"p{i}"]
        assert row["tokens"] == oracle_greedy(model[1], prompt, 4 + i)
        assert sum(row["tokens_per_step"]) == 4 + i
        assert row["finish_reason"] == "length"
        assert "error" not in row
    assert len(by_id["h"]["tokens"]) == 7
    reasons = {None: "not JSON", "e": "exactly one of", "f": "empty", "g": "max_tokens", "i": "9999", "j": "string"}
    reasons["\ud800"] = "Unicode"
    for key, reason in reasons.items():
        assert reason in by_id[key]["error"]
        assert by_id[key]["tokens"] == []
    assert summary["requests"] == 13
    assert summary["output_tokens"] == sum(len(row["tokens"]) for row in rows)
    assert summary["decode_steps"] == sum(len(row["tokens_per_step"]) for row in rows)
    assert summary["world_size"] == size
    assert summary["dtype"] == "float32"
    assert summary["tokens_per_second"] > 0
    assert summary["mean_acceptance_length"] == pytest.approx(
        summary["output_tokens"] / summary["decode_steps"], abs=1e-3
    )


def test_samples_and_log_probabilities(model, tmp_path):
    asked = prompts(3)
    lines = [json.dumps({"id": i, "prompt_tokens": prompt.tolist()}) for i, prompt in enumerate(asked)]
    values = {"max_tokens": 9, "temperature": 0.8, "seed": 4, "frequency_penalty": 0.6, "repetition_penalty": 1.2}
    values |= {"min_tokens": 2, "logprobs": 1, "prompt_logprobs": 0}
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    rows, summary = generate(model, tmp_path, lines, 1, "--samples", "2", *flags)
    assert [row["id"] for row in rows] == [0, 1, 2]
    for row, prompt in zip(rows, asked, strict=True):
        assert len(row["prompt_logprobs"]) == len(prompt) - 1
        assert row["tokens"] == row["samples"][0]["tokens"]
        for number, sample in enumerate(row["samples"]):
            tokens, raw = textbook.decode(model[1], prompt, SamplingParams(**values), {2}, number)
            assert sample["tokens"] == tokens
            expected = raw.double().log_softmax(-1)[range(len(tokens)), tokens]
            # Two float32 models agree to about 1e-5 in logits of this size.
            assert [t["logprob"] for t in sample["logprobs"]] == pytest.approx(expected.tolist(), abs=1e-4)
            assert all(len(t["top"]) == 1 for t in sample["logprobs"])
    assert summary["requests"] == 3
    assert summary["output_tokens"] == sum(len(sample["tokens"]) for row in rows for sample in row["samples"])


@pytest.mark.parametrize(
    ("prompts_name", "out_name", "message"),
    [
        ("none.jsonl", "out.jsonl", "cannot read the prompts"),
        ("in.jsonl", "none/out.jsonl", "cannot write the answers"),
    ],
)
def test_files_that_cannot_be_used_are_one_clear_error(model, tmp_path, prompts_name, out_name, message):
    (tmp_path / "in.jsonl").write_text("{}")
    command = ["--model", str(model[0]), "--dtype", "float32"]
    command += ["--prompts", str(tmp_path / prompts_name), "--out", str(tmp_path / out_name)]
    done = run_script(ROOT / "launch" / "generate.py", *command)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
