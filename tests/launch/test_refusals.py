"""Refused commands end before the model is loaded, with one line of one rank and no traceback."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from support import ROOT, run_script

REPORT = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"


def start(script: str, size: int, *flags: str) -> subprocess.CompletedProcess:
    path = str(ROOT / "launch" / f"{script}.py")
    if not size:
        return run_script(path, *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), path, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd="/")


def refused(done: subprocess.CompletedProcess, message: str) -> None:
    """Assert that one line has the message and only torchrun's report follows."""
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert done.stdout == ""
    assert done.stderr.count("Traceback") == done.stderr.count(REPORT), done.stderr
    assert "euryale.frontend" not in done.stderr


@pytest.fixture
def damaged(model, tmp_path):
    """A copy of the model without weights, so that loading them would show as another error."""
    shutil.copytree(model[0], tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.unlink()
    return tmp_path / "model"


@pytest.mark.parametrize("size", [0, 2])
def test_a_taken_port_is_noticed_before_the_model_is_loaded(damaged, size):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = start("serve", size, "--model", str(damaged), "--bind", address, "--device", "cpu")
    refused(done, f"cannot listen at '{address}': Address already in use: give --bind another address")


def test_a_broken_tokenizer_is_noticed_before_the_model_is_loaded(damaged):
    path = damaged / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": 5}))
    done = start("serve", 0, "--model", str(damaged), "--bind", "tcp://127.0.0.1:0", "--device", "cpu")
    refused(done, "tokenizer_config.json: eos_token must be null, or a string")


def test_a_model_without_weights_ends_the_front_end_in_silence(damaged):
    done = start("serve", 2, "--model", str(damaged), "--bind", "tcp://127.0.0.1:0", "--device", "cpu")
    refused(done, "has neither model.safetensors nor model.safetensors.index.json")


def test_flags_that_no_rank_can_use_are_refused_once(model):
    refused(
        start("serve", 4, "--model", str(model[0]), "--max-itl", "nan"), "--max-itl must be a number of milliseconds"
    )


def test_generate_reads_its_files_before_the_model_is_loaded(damaged, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}")
    done = start("generate", 2, "--model", str(damaged), "--prompts", "none", "--out", str(tmp_path / "out"))
    refused(done, "cannot read the prompts none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 10**18}, "config.json: max_position_embeddings must be"),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps must be a number above 0 and at most 1, not nan"),
    ],
)
def test_a_config_that_cannot_be(damaged, changes, message):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(start("serve", 0, "--model", str(damaged), "--bind", "tcp://127.0.0.1:0"), message)
