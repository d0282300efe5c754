"""Helpers of many tests: tiny random models of every family, pools of real ranks, and forks that run scripts.

Importing this module makes a bare checkout importable (see ``bare``), in spawned children too.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import torch
import transformers
from bare import ROOT  # noqa: F401
from safetensors.torch import save_file

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 3001, 4, 2, 24  # odd on purpose: nothing divides among 4 ranks but the heads


def family_config(family: str, **changes):
    """A two-layer config of a family, with sizes that do not divide."""
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 72,
        "intermediate_size": 130,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": None,
    }
    if family != "qwen2":  # Qwen2 derives it
        sizes["head_dim"] = HEAD_DIM
    if family == "mistral":
        sizes["sliding_window"] = 24
    return getattr(transformers, f"{kind}Config")(**(sizes | changes))


def make_model(directory: Path, config, seed: int = 0, shard_size: str = "5GB"):
    """Save a random float32 model; returns it for use as the oracle."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Larger than the usual initialisation, so that greedy answers vary instead of repeating one token.
            p.normal_(0, 0.12) if p.ndim > 1 or "bias" in name else p.uniform_(0.8, 1.2)
        if config.tie_word_embeddings:
            model.tie_weights()
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


def head_tensors(model, num_heads: int = 3, num_layers: int = 1, own_lm_head: bool = True, seed: int = 0) -> dict:
    """Random Medusa heads in format A names (B without lm_heads). They start from the model's lm_head, so that
    some of their predictions are right."""
    torch.manual_seed(seed)
    lm_head = model.lm_head.weight.detach()
    hidden = lm_head.shape[1]
    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(hidden, hidden) * 0.05
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(hidden) * 0.05
        if own_lm_head:
            tensors[f"{head}.{num_layers}.weight"] = lm_head + torch.randn_like(lm_head) * 0.02
    return tensors


def save_heads(directory: Path, tensors: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "medusa_lm_head.safetensors")
    return directory


def prompts(count: int, vocab: int = VOCAB, seed: int = 0) -> list[np.ndarray]:
    """Random prompts from 1 token to several chunks of 32."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 31, 32, 33, 64, 70, 100]
    return [rng.integers(3, vocab, size=lengths[i % len(lengths)]).astype(np.int32) for i in range(count)]


def oracle_greedy(model, prompt: np.ndarray, max_tokens: int) -> list[int]:
    """transformers' greedy answer without stopping at end-of-sequence tokens."""
    ids = torch.from_numpy(prompt)[None].long()
    options = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
    saved, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        model.generation_config.eos_token_id = saved
    return out[0, len(prompt) :].tolist()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _forks():
    """Where processes come from that begin with the large libraries imported, which takes others seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "transformers.activations", "euryale.runtime.engine"])
    return context


def _script_main(name: str, arguments: list[str], before: Callable[[], None] | None, out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    if before:
        before()
    sys.argv = [name, *arguments]
    (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")


def run_script(name: str | Path, *arguments: str, before: Callable[[], None] | None = None) -> CompletedProcess:
    """What ``python NAME ARGUMENTS`` (or ``python -m`` for a module's name) does, in a fork of a process that has the
    large libraries imported. ``before``: called there first."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = _forks().Process(target=_script_main, args=(str(name), [*arguments], before, out.name, err.name))
        process.start()
        process.join(110)  # less than a test may take
        if process.exitcode is None:
            process.kill()
            process.join()
        return CompletedProcess([name, *arguments], process.exitcode, out.read(), err.read())


def _rank_main(rank: int, size: int, port: int, pipe) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from euryale.parallel.group import join

    torch.set_num_threads(1)
    group = join(timeout=30)
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, args = job
        try:
            pipe.send((True, function(group, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    group.close()


class Ranks:
    """A group of real processes joined by gloo that runs functions ``f(group, *args)`` on every rank."""

    def __init__(self, size: int) -> None:
        context = _forks()
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args) -> list:
        """The function's result on every rank, in rank order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self.pipes]
        failures = [text for ok, text in answers if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"


def row_params(rows: list[tuple]):
    """RowParams from each row's parameters and its position in the answer."""
    from euryale.kernels.tables import Tables
    from euryale.runtime.sampling.sampler import RowParams, row_arrays

    is_plain = not any(params.is_filtered for params, _ in rows)
    return RowParams(
        is_plain=is_plain, **Tables(row_arrays([(p, 0, at) for p, at in rows]), torch.device("cpu")).tensors
    )


def as_logprobs(parts: list):
    """Parts of TokenLogprobs as the client library gives them."""
    from euryale.client.logprobs import Logprobs
    from euryale.frontend.messages import pack_logprobs
    from euryale.scheduler.step_result import TokenLogprobs

    return Logprobs(*pack_logprobs(TokenLogprobs.join(parts)))


def answer(group, config, wanted: list[tuple], arrivals: int = 0) -> dict | None:
    """Run requests (prompt, SamplingParams, sample or nothing) through an engine of this group; the leader returns what
    came out.

    ``arrivals``: steps between one request's arrival and the next (0: all at once).
    """
    from euryale.runtime.engine import Engine
    from euryale.scheduler.request import Request

    asked = [(*one, 0) if len(one) == 2 else one for one in wanted]

    engine = Engine(config, group)
    if not group.is_leader:
        engine.follow()
        return None
    requests = [Request(key=i, prompt=p, params=params, sample_index=s) for i, (p, params, s) in enumerate(asked)]
    queue, steps = list(requests), 0
    logprobs: list[list] = [[] for _ in requests]

    def arrive() -> None:
        if queue and arrivals and steps % arrivals == 0:
            engine.scheduler.add(queue.pop(0))

    while queue or engine.scheduler.has_work:
        while queue and not (arrivals and engine.scheduler.has_work):
            engine.scheduler.add(queue.pop(0))
        for output in engine.step(arrive).outputs:
            logprobs[output.key] += [output.logprobs] if output.logprobs is not None else []
        steps += 1
    engine.stop()
    admission = engine.scheduler.admission
    pool = admission.pages
    assert pool.num_free == pool.num_pages, "pages were not given back"
    return {
        "outputs": [r.output for r in requests],
        "tokens_per_step": [r.tokens_per_step for r in requests],
        "reasons": [str(r.finish_reason) for r in requests],
        "steps": steps,
        "shared": admission.num_cached_tokens,
        "recomputed": admission.num_recomputed,
        "preempted": [r.num_preempted for r in requests],
        "prompt_logprobs": [as_logprobs(r.prompt_logprobs) for r in requests],
        "logprobs": [as_logprobs(parts) for parts in logprobs],
    }
