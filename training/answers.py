"""The backbone's own answers, written by this runtime's engine on all ranks: what self-distillation learns from (Medusa
paper, arXiv 2401.10774, section 2.3.2) and heads are judged on.
"""

import contextlib
import dataclasses
import logging
from typing import TextIO

import numpy as np

from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import Group
from euryale.runtime import offline
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.offline import Job
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.training.data import Document

logger = logging.getLogger("euryale.training")


def choose_prompts(documents: list[Document], count: int, length: int, max_positions: int) -> list[np.ndarray]:
    """At most ``count`` prompts, int32 each: the documents' own where they have any, else evenly spaced pieces of
    ``length`` tokens. Prompts that leave the model no room to answer in ``max_positions`` are left out. ValueError if
    there are none."""
    own = [d.prompt for d in documents if len(d.prompt)]
    if own:
        prompts = [prompt for prompt in own if len(prompt) < max_positions]
        if not prompts:
            raise ValueError(f"all prompts are longer than the model's {max_positions} tokens: give shorter ones")
        if len(prompts) < len(own):
            logger.info("%d of %d prompts are longer than the model and left out", len(own) - len(prompts), len(own))
        chosen = np.unique(np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(np.int64))
        return [prompts[i] for i in chosen]
    rooms = np.array([max(0, len(d.tokens) - length) for d in documents])
    ends = np.cumsum(rooms)
    if length >= max_positions or not len(ends) or ends[-1] < 1:
        raise ValueError(f"no document has prompts of {length} tokens: lower --prompt-tokens or give other --data")
    places = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).astype(np.int64))
    found = []
    for place in places:
        number = int(np.searchsorted(ends, place, side="right"))
        start = int(place - (ends[number] - rooms[number]))
        found.append(documents[number].tokens[start : start + length])
    return found


def write_answers(
    config: EngineConfig,
    group: Group,
    prompts: list[np.ndarray],
    params: SamplingParams,
    out: TextIO | None,
    first: int = 0,
) -> dict | None:
    """Answer the prompts from number ``first`` on and write a JSON line for each, with ``prompt_tokens`` and
    ``tokens``, in their order and as soon as possible. ``prompts`` and ``out`` are the leader's; the other ranks help
    and get None. Request i draws with seed ``params.seed + i``. ValueError if the disk is full."""
    engine = Engine(config, group)
    if not group.is_leader:
        engine.follow()
        return None
    tokenizer = load_tokenizer(config.model, engine.loaded.limits.vocab_size)
    jobs = [Job(key, [_request(key, prompt, params, engine)]) for key, prompt in list(enumerate(prompts))[first:]]
    try:
        return offline.generate(engine, jobs, tokenizer, out, lambda: False, with_prompts=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            out.close()  # now, or what could not be written would be tried again when the caller closes
        raise ValueError(f"cannot write answers: {error}. Make room and give the same command again") from error
    finally:
        engine.stop()


def _request(key: int, prompt: np.ndarray, params: SamplingParams, engine: Engine) -> Request:
    """A prompt near the model's length gets a shorter answer."""
    room = max(1, engine.loaded.limits.max_model_len - len(prompt))
    params = dataclasses.replace(params, seed=params.seed + key, max_tokens=min(params.max_tokens, room))
    return Request(key=key, prompt=prompt, params=params)
