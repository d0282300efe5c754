"""Serving end to end: torchrun starts ranks, clients use them over sockets, processes are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import msgpack
import numpy as np
import psutil
import pytest
import textbook
import zmq
from serving import served, wait_until_idle
from support import ROOT, oracle_greedy, prompts, run_script

from euryale.client import Client, GroupLost, InvalidRequest, ServerLost
from euryale.scheduler.sampling_params import SamplingParams


@pytest.mark.parametrize(("loop", "tree"), [("plain", "static"), ("overlapped", "dynamic")])
def test_a_group_of_two_serves(model, loop, tree):
    """Streaming, batches, chat, cancelling, bad input and an end by a signal or by the client, of one running group."""
    with served(model, 2, "--loop", loop, "--tree", tree) as (group, address), Client(address) as client:
        info = client.hello()
        assert (info.tensor_parallel_size, info.num_medusa_heads, info.max_model_len) == (2, 3, 256)
        asked = [p % 290 + 3 for p in prompts(6)]
        running = [client.generate(prompt_tokens=p.tolist(), max_tokens=20, ignore_eos=True) for p in asked]
        for prompt, generation in zip(asked, running, strict=True):
            result = generation.result()
            assert list(result.tokens) == oracle_greedy(model[1], prompt, 20)
            assert sum(result.tokens_per_step) == 20
            assert result.finish_reason == "length"
        seeded = {"max_tokens": 30, "temperature": 0.9, "seed": 5, "ignore_eos": True}
        plain = client.generate("hello", speculation=False, **seeded).result()
        tree = client.generate("hello", **seeded).result()
        chat = client.generate(messages=[{"role": "user", "content": "hello"}], **seeded).result()
        assert plain.tokens == tree.tokens == chat.tokens
        assert plain.text == tree.text
        check_stop_string(client, seeded, plain)
        check_samples(client, model[1])
        check_bad_input(client, address)
        # Leaving the loop cancels; so does vanishing with requests in flight.
        for _ in client.generate("again", max_tokens=200, ignore_eos=True):
            break
        with Client(address) as vanishing:
            next(iter(vanishing.generate("gone", max_tokens=200, ignore_eos=True)))
        stats = wait_until_idle(client, num_cancelled=2)
        assert stats["engine_cancelled"] >= 2
        assert client.health().status == "ok"
        if loop == "plain":
            check_signal_drains(client, group, signal.SIGTERM)
        else:
            client.drain()
            assert group.wait(30) == 0


def check_stop_string(client: Client, seeded: dict, plain) -> None:
    """The text ends before the stop string although tokens hold single bytes."""
    start = next(i for i in range(3, len(plain.text) - 3) if plain.text[i : i + 3].isascii())
    stop = plain.text[start : start + 3]
    result = client.generate("hello", stop=[stop], **seeded).result()
    assert result.finish_reason == "stop"
    assert result.text == plain.text[: plain.text.index(stop)]


def check_samples(client: Client, made) -> None:
    """Several samples under penalties, with log-probabilities, beside a bare request, are token-by-token decoding."""
    prompt = (prompts(8)[7] % 290 + 3).astype(np.int32)
    asked = {"max_tokens": 20, "temperature": 0.8, "seed": 3, "min_tokens": 9, "logprobs": 2, "prompt_logprobs": 1}
    asked |= {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.3}
    bias = {7: 4.0, 8: -50.0}
    bare = client.generate(prompt_tokens=prompt.tolist(), max_tokens=20, ignore_eos=True)
    result = client.generate(prompt_tokens=prompt.tolist(), n=3, logit_bias=bias, **asked).result()
    assert list(bare.result().tokens) == oracle_greedy(made, prompt, 20)
    params = SamplingParams(logit_bias=tuple(bias.items()), **asked)
    for number, sample in enumerate(result.samples):
        tokens, raw = textbook.decode(made, prompt, params, {2}, number)
        assert list(sample.tokens) == tokens
        expected = raw.double().log_softmax(-1)[range(len(tokens)), tokens]
        # Two float32 models agree to about 1e-5 in logits of this size.
        np.testing.assert_allclose([token.logprob for token in sample.logprobs], expected, atol=1e-4)
    assert len({sample.tokens for sample in result.samples}) == 3
    assert len(result.prompt_logprobs) == len(prompt) - 1


def check_bad_input(client: Client, address: str) -> None:
    """Each message gets an error of its own, and the server continues."""
    bad = [
        ({"prompt": ""}, "empty"),
        ({"prompt_tokens": []}, "empty"),
        ({"prompt_tokens": [300]}, "300"),
        ({"prompt_tokens": [-1]}, "-1"),
        ({"prompt": "x" * 400}, "256"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "x", "unknown": 1}, "unknown"),
    ]
    for request, mention in bad:
        with pytest.raises(InvalidRequest, match=mention):
            client.generate(**request).result()
    raw = zmq.Context.instance().socket(zmq.DEALER)
    raw.linger, raw.rcvtimeo = 0, 10_000
    raw.connect(address)
    for frames in ([b"1", b"\xc1"], [b"2"], [b"3", b"x", b"y"], [b"4", b"\x81\xa4type\xa4jump"]):
        raw.send_multipart(frames)
        request_id, body = raw.recv_multipart()
        assert (request_id, msgpack.unpackb(body)["type"]) == (frames[0], "error")
    raw.close()
    assert len(client.generate("still there", max_tokens=3, ignore_eos=True).result().tokens) == 3


def check_signal_drains(client: Client, group, number: int) -> None:
    """Running requests finish before the group ends."""
    generation = iter(client.generate("hello", max_tokens=100, ignore_eos=True))
    count = len(next(generation).tokens)
    group.send_signal(number)
    count += sum(len(delta.tokens) for delta in generation)
    assert count == 100
    group.wait(30)


def test_an_interrupt_drains_a_single_rank(model):
    with served(model, 1) as (group, address), Client(address) as client:
        check_signal_drains(client, group, signal.SIGINT)


@pytest.mark.parametrize(("size", "victim"), [(2, "rank 0"), (2, "rank 1"), (1, "agent")])
def test_a_killed_process_ends_the_whole_group(model, size, victim):
    """After SIGKILL of any process the client gets an error at once, and no process or file is left."""
    with served(model, size, "--max-model-len", "250") as (group, address), Client(address) as client:
        workers = [p for p in psutil.Process(group.pid).children() if "serve.py" in " ".join(p.cmdline())]
        ranks = {p.environ().get("RANK"): p for p in workers}
        stream = iter(client.generate("hello", max_tokens=230, ignore_eos=True))
        next(stream)
        started = time.monotonic()
        target = group.pid if victim == "agent" else ranks[victim[-1]].pid
        os.kill(target, signal.SIGKILL)
        with pytest.raises((GroupLost, ServerLost)):
            for _ in stream:
                pass
        assert time.monotonic() - started < 20  # a hang would take the step timeout of 30 s
        assert group.wait(40) != 0


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_cannot_be_served_is_refused_at_start(model, tmp_path, size):
    (tmp_path / "tree.json").write_text(json.dumps([[0] * d for d in range(1, 6)]))
    script, heads, tree = str(ROOT / "launch" / "serve.py"), str(model[0] / "medusa"), str(tmp_path / "tree.json")
    command = ["--model", str(model[0]), "--medusa", heads, "--tree", tree]
    if size == 1:  # without torchrun
        done = run_script(script, *command)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), script, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode != 0
    assert "has depth 5 but there are 3 Medusa heads: prune it" in done.stderr
    assert "ready" not in done.stdout
