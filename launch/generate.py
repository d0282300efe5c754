"""Offline generation: ``torchrun --nproc-per-node N launch/generate.py --model DIR --prompts IN --out OUT``.

Also runs without torchrun, as a group of one. The last line on stdout is one JSON object of figures.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # where nothing is installed, this checkout

from transformers import PreTrainedTokenizerBase

from euryale.client.params import ACCEPTANCE_RULES
from euryale.frontend.tokenizer import load_tokenizer
from euryale.runtime import offline
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.flags import KINDS, METAVARS, FlagParser, add_flags, from_flags
from euryale.runtime.model.config import load_model_config
from euryale.runtime.worker import leave, run_worker
from euryale.scheduler.sampling_params import SamplingParams

# The sampling parameters that are flags: what each means, and what its default means where the value does not say it.
# Type and default come from SamplingParams, the bounds from client/params.py: a new flag is one more line.
SAMPLING = {
    "max_tokens": ("most tokens of an answer, unless its line says otherwise", ""),
    "min_tokens": ("tokens before which an answer does not end", ""),
    "temperature": ("spread of the draw, from 0.001 to 100", "0, greedy"),
    "top_k": ("draw from so many of the likeliest tokens", "0, from all"),
    "top_p": ("draw from the likeliest tokens that together have this probability", "1, from all"),
    "min_p": ("draw from tokens with at least this fraction of the likeliest one's probability", "0, from all"),
    "seed": ("what the draw depends on, from 0 to 2**64 - 1", "0, the same in every run"),
    "presence_penalty": ("taken off the logit of every token the answer holds, from -2 to 2", "0, off"),
    "frequency_penalty": ("taken off a logit for each time the answer holds the token, from -2 to 2", "0, off"),
    "repetition_penalty": ("divides the logits of tokens in prompt and answer, from 0.01 to 100", "1, off"),
    "logprobs": ("write log-probabilities of the answer, and of so many likeliest tokens, 0 to 20", "none"),
    "prompt_logprobs": ("the same of the prompt, 0 to 20", "none"),
    "n": ("independent answers to each prompt, 1 to 128", ""),
}
ACCEPTANCE = {
    "acceptance": ("which draft tokens are accepted: exact changes no token, typical is lossy and faster", ""),
    "epsilon": ("posterior threshold of typical acceptance, from 0 to 1", ""),
    "delta": ("posterior alpha of typical acceptance, from 0 to 1", ""),
}
FLAG_OF = {"n": "samples"}  # torchrun would take --n for a flag of its own


@dataclass(frozen=True)
class Prepared:
    """What is read and opened before the model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    jobs: list[offline.Job]
    out: TextIO


def parser() -> FlagParser:
    found = FlagParser(description=__doc__)
    files = found.add_argument_group("files")
    lines = 'JSONL of {"id", "prompt" or "prompt_tokens", "max_tokens" if wanted} (required)'
    files.add_argument("--prompts", type=Path, required=True, metavar="FILE", help=lines)
    answers = "JSONL of answers, in input order; overwritten (required)"
    files.add_argument("--out", type=Path, required=True, metavar="FILE", help=answers)
    sampling = found.add_argument_group("sampling; docs/protocol.md says more")
    acceptance = found.add_argument_group("acceptance of draft tokens; docs/protocol.md says more")
    for group, table in ((sampling, SAMPLING), (acceptance, ACCEPTANCE)):
        for name, (text, default) in table.items():
            value = getattr(SamplingParams, name)
            kind = int if value is None else type(value)
            flag, words = f"--{FLAG_OF.get(name, name).replace('_', '-')}", f"{text} (default: {default or value})"
            shape = {"choices": ACCEPTANCE_RULES} if kind is str else {"metavar": METAVARS[kind]}
            group.add_argument(flag, dest=name, type=KINDS.get(kind, kind), default=value, help=words, **shape)
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on after end-of-sequence tokens (default: end there)"
    )
    add_flags(found, EngineConfig)
    found.add_argument(
        "--no-speculation", action="store_true", help="one token a step; same as --tree off (default: as --tree says)"
    )
    return found


@contextlib.contextmanager
def opened(config: EngineConfig, args: argparse.Namespace) -> Iterator[Prepared]:
    """Everything that can be found wrong without the model: parameters, prompts, tokenizer, the file of answers."""
    try:
        params = SamplingParams(**{name: getattr(args, name) for name in (*SAMPLING, *ACCEPTANCE, "ignore_eos")})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{FLAG_OF.get(name, name).replace('_', '-')} {rest}") from None
    tokenizer = load_tokenizer(config.model, load_model_config(config.model, config.dtype).vocab_size)
    jobs = list(offline.read_jobs(args.prompts, tokenizer, params))
    try:
        out = args.out.open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the answers to {args.out}: {error}") from error
    with out:
        yield Prepared(tokenizer, jobs, out)


def lead(engine: Engine, prepared: Prepared) -> None:
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # stop between two steps, when no other rank is waiting
        signal.signal(number, lambda *_: interrupted.set())
    if Path(prepared.out.name).is_file():  # what an earlier run wrote is kept until here; a pipe has no end to cut
        prepared.out.truncate(0)
    summary = offline.generate(engine, prepared.jobs, prepared.tokenizer, prepared.out, interrupted.is_set)
    print(json.dumps(summary), flush=True)


def main() -> int:
    args = parser().parse_args()

    def config() -> EngineConfig:
        engine = from_flags(EngineConfig, args)
        return dataclasses.replace(engine, tree="off") if args.no_speculation else engine

    return run_worker(config, lambda engine: opened(engine, args), lead)


if __name__ == "__main__":
    leave(main())
