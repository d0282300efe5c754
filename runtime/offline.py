"""Offline generation: a list of prompts in, their answers out, through the same engine that serves."""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from euryale.client.params import PROMPT_RULES
from euryale.client.rules import shown
from euryale.frontend.detokenizer import Detokenizer, TokenBytes, Tokenizer
from euryale.runtime.engine import Engine
from euryale.scheduler import json_file
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import TokenLogprobs


@dataclass
class Job:
    """One line of the input: its ``requests``, one for each sample, or the ``error`` that kept it from becoming any."""

    id: object
    requests: list[Request] = field(default_factory=list)
    error: str | None = None


def read_jobs(path: Path, tokenizer, params: SamplingParams) -> Iterator[Job]:
    """Jobs of a JSONL file with ``{"id", "prompt" | "prompt_tokens", "max_tokens"?}`` lines. A bad line becomes a
    job with an error; only a file that cannot be read raises ValueError."""
    try:
        # Not splitlines(): JSON strings may hold other line separators than the newline.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    for key, line in enumerate(lines):
        if line.strip():
            yield _job(key, line, tokenizer, params)


def _job(key: int, line: str, tokenizer, params: SamplingParams) -> Job:
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


def _requests(key: int, row: dict, tokenizer, params: SamplingParams) -> list[Request]:
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
    first = dataclasses.replace(params, prompt_logprobs=None)  # the same for all samples: the first one's are enough
    return [
        Request(key=key * params.n + sample, prompt=prompt, params=first if sample else params, sample_index=sample)
        for sample in range(params.n)
    ]


def generate(
    engine: Engine,
    jobs: list[Job],
    tokenizer: Tokenizer,
    out: TextIO,
    is_interrupted: Callable[[], bool],
    with_prompts: bool = False,
) -> dict:
    """Run all jobs on the leader and write one JSON line per job, in input order, each as soon as those before it
    are done; ``with_prompts`` with the prompt's tokens too. Returns the summary; loading is not part of ``seconds``.
    KeyboardInterrupt, between two steps, when ``is_interrupted``."""
    for job in jobs:
        try:
            for request in job.requests:  # what keeps one sample out keeps out the first
                engine.scheduler.add(request)
        except ValueError as error:
            job.error, job.requests = str(error), []
    requests = [request for job in jobs for request in job.requests]
    told: dict[int, list[TokenLogprobs]] = {
        request.key: [] for request in requests if request.params.logprobs is not None
    }
    token_bytes = TokenBytes(tokenizer)
    waiting, started = deque(jobs), time.perf_counter()
    with tqdm(total=len(requests), desc="generating", unit="prompt") as bar:
        while engine.scheduler.has_work:
            if is_interrupted():
                raise KeyboardInterrupt
            outputs = engine.step(lambda: _write_finished(out, waiting, token_bytes, told, with_prompts)).outputs
            for output in outputs:
                if output.logprobs is not None:
                    told[output.key].append(output.logprobs)
            bar.update(sum(o.finish_reason is not None for o in outputs))
    seconds = time.perf_counter() - started
    _write_finished(out, waiting, token_bytes, told, with_prompts)
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
    out: TextIO, waiting: deque[Job], token_bytes: TokenBytes, told: dict[int, list[TokenLogprobs]], with_prompts: bool
) -> None:
    """Write the answers at the head of the queue that are complete."""
    while waiting and all(request.finish_reason for request in waiting[0].requests):
        job = waiting.popleft()
        row: dict = {"id": job.id, "text": "", "tokens": [], "finish_reason": None, "tokens_per_step": []}
        if job.requests:
            samples = [_answer(request, token_bytes, told) for request in job.requests]
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
        out.flush()  # a killed run keeps what was answered


def _answer(request: Request, token_bytes: TokenBytes, told: dict[int, list[TokenLogprobs]]) -> dict:
    text = Detokenizer(token_bytes, request.prompt.tolist())
    answer = {
        "text": text.push(request.output) + text.finish(),
        "tokens": request.output,
        "finish_reason": request.finish_reason,
        "tokens_per_step": request.tokens_per_step,
    }
    if request.key in told:
        answer["logprobs"] = _readable(TokenLogprobs.join(told[request.key]))
    return answer


def _readable(logprobs: TokenLogprobs) -> list[dict]:
    columns = zip(logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top.tolist(), strict=True)
    return [{"logprob": value, "top": list(zip(ids, top, strict=True))} for value, ids, top in columns]
