"""Offline generation: answers a file of prompts with the engine that also serves."""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from euryale.client.params import PROMPT_RULES
from euryale.client.rules import shown
from euryale.frontend.detokenizer import Detokenizer, TokenBytes, Tokenizer
from euryale.runtime.engine import Engine
from euryale.scheduler import json_file
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import TokenLogprobs

Logprobs = dict[int, list[TokenLogprobs]]  # of the output tokens so far, by request key, in parts


@dataclass
class Job:
    """One line of the input: its ``requests``, one for each sample, or the ``error`` that refuses it."""

    id: object
    requests: list[Request] = field(default_factory=list)
    error: str | None = None


def read_jobs(path: Path, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> Iterator[Job]:
    """Read a JSONL file with ``{"id", "prompt" | "prompt_tokens", "max_tokens"?}`` lines.

    A bad line becomes a job with an error. Raises ValueError only if the file cannot be read.
    """
    try:
        # Not splitlines(): JSON strings may contain line separators other than the newline.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    for key, line in enumerate(lines):
        if line.strip():
            yield _job(key, line, tokenizer, params)


def _job(key: int, line: str, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> Job:
    try:
        row = json_file.parse(line)
    except ValueError as error:
        return Job(None, error=f"line {key + 1} is not JSON that can be read: {error}")
    if not isinstance(row, dict):
        return Job(None, error=f"line {key + 1} must be an object with a prompt, not {shown(row)}")
    try:
        return Job(row.get("id"), _requests(key, row, tokenizer, params))
    except ValueError as error:
        return Job(row.get("id"), error=str(error))


def _requests(
    key: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, params: SamplingParams
) -> list[Request]:
    if unknown := set(row) - {"id", "prompt", "prompt_tokens", "max_tokens"}:
        raise ValueError(f"unknown field {shown(min(unknown))}: a line has id, prompt or prompt_tokens, max_tokens")
    if ("prompt" in row) == ("prompt_tokens" in row):
        raise ValueError("give exactly one of prompt and prompt_tokens")
    if "max_tokens" in row:
        params = dataclasses.replace(params, max_tokens=row["max_tokens"])
    if "prompt" in row:
        PROMPT_RULES["prompt"].check("prompt", row["prompt"])
        tokens = tokenizer.encode(row["prompt"]) if row["prompt"] else []
    else:
        tokens = row["prompt_tokens"]
        PROMPT_RULES["prompt_tokens"].check("prompt_tokens", tokens)
    prompt = np.asarray(tokens, dtype=np.int32)
    others = dataclasses.replace(params, prompt_logprobs=None)  # equal for all samples, so only the first has them
    return [
        Request(key=key * params.n + sample, prompt=prompt, params=others if sample else params, sample_index=sample)
        for sample in range(params.n)
    ]


def generate(
    engine: Engine,
    jobs: list[Job],
    tokenizer: Tokenizer,
    out: TextIO,
    is_interrupted: Callable[[], bool],
    with_prompts: bool = False,
) -> dict[str, Any]:
    """Run all jobs and write one JSON line per job to ``out``, in input order. For the leader only.

    A line is written as soon as its job and those before it are done. ``with_prompts``: lines include the prompt's
    tokens. Returns the summary, whose ``seconds`` exclude loading. Raises KeyboardInterrupt between two steps once
    ``is_interrupted()``.
    """
    for job in jobs:
        try:
            for request in job.requests:  # what refuses one sample refuses the first
                engine.scheduler.add(request)
        except ValueError as error:
            job.error, job.requests = str(error), []
    requests = [request for job in jobs for request in job.requests]
    logprobs: Logprobs = {request.key: [] for request in requests if request.params.logprobs is not None}
    token_bytes = TokenBytes(tokenizer)
    waiting, started = deque(jobs), time.perf_counter()
    with tqdm(total=len(requests), desc="generating", unit="prompt") as bar:
        while engine.scheduler.has_work:
            if is_interrupted():
                raise KeyboardInterrupt
            outputs = engine.step(lambda: _write_finished(out, waiting, token_bytes, logprobs, with_prompts)).outputs
            for output in outputs:
                if output.logprobs is not None:
                    logprobs[output.key].append(output.logprobs)
            bar.update(sum(o.finish_reason is not None for o in outputs))
    seconds = time.perf_counter() - started
    _write_finished(out, waiting, token_bytes, logprobs, with_prompts)
    steps = sum(len(r.tokens_per_step) for r in requests)
    tokens = sum(len(r.output) for r in requests)
    return {
        "requests": len(jobs),
        "output_tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2) if tokens else 0.0,
        "mean_acceptance_length": round(tokens / steps, 4) if steps else 0.0,
        "decode_steps": steps,
        "world_size": engine.group.size,
        "dtype": str(engine.loaded.model.dtype).removeprefix("torch."),
        "errors": sum(job.error is not None for job in jobs),
    }


def _write_finished(
    out: TextIO, waiting: deque[Job], token_bytes: TokenBytes, logprobs: Logprobs, with_prompts: bool
) -> None:
    """Write the complete answers at the head of the queue."""
    while waiting and all(request.finish_reason for request in waiting[0].requests):
        job = waiting.popleft()
        row: dict[str, Any] = {"id": job.id, "text": "", "tokens": [], "finish_reason": None, "tokens_per_step": []}
        if job.requests:
            samples = [_answer(request, token_bytes, logprobs) for request in job.requests]
            first = job.requests[0]
            row |= samples[0]
            if len(samples) > 1:
                row["samples"] = samples
            if first.params.prompt_logprobs is not None:
                row["prompt_logprobs"] = _readable(TokenLogprobs.join(first.prompt_logprobs))
            if with_prompts:
                row["prompt_tokens"] = first.prompt.tolist()
        else:
            row["error"] = job.error
        out.write(json.dumps(row) + "\n")
        out.flush()  # so that a killed run keeps its answers


def _answer(request: Request, token_bytes: TokenBytes, logprobs: Logprobs) -> dict[str, Any]:
    text = Detokenizer(token_bytes, request.prompt.tolist())
    answer: dict[str, Any] = {
        "text": text.push(request.output) + text.finish(),
        "tokens": request.output,
        "finish_reason": request.finish_reason,
        "tokens_per_step": request.tokens_per_step,
    }
    if request.key in logprobs:
        answer["logprobs"] = _readable(TokenLogprobs.join(logprobs[request.key]))
    return answer


def _readable(logprobs: TokenLogprobs) -> list[dict[str, Any]]:
    """Log-probabilities as JSON: for each token its own and those of the likeliest tokens."""
    columns = zip(logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top.tolist(), strict=True)
    return [{"logprob": value, "top": list(zip(ids, top, strict=True))} for value, ids, top in columns]
