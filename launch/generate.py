"""Offline generation: ``torchrun --nproc-per-node N launch/generate.py --model DIR --prompts IN --out OUT``.

Also runs without torchrun, as a group of one. The last line on stdout is one JSON object of results.
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
from typing import Any, TextIO

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # for a checkout that is not installed

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

# The sampling parameters that are flags: the help text, and the default in words if the value is not clear by itself.
# Type and default come from SamplingParams, the bounds from client/params.py: a new flag is one more line.
SAMPLING = {
    "max_tokens": ("maximum number of tokens of an answer, unless its line sets another", ""),
    "min_tokens": ("minimum number of tokens of an answer", ""),
    "temperature": ("sampling temperature: 0, or 0.001 to 100", "0, greedy"),
    "top_k": ("sample from this many of the likeliest tokens", "0, all"),
    "top_p": ("sample from the likeliest tokens with this total probability", "1, all"),
    "min_p": ("sample from tokens with at least this fraction of the likeliest token's probability", "0, all"),
    "seed": ("seed of the sampling, from 0 to 2**64 - 1", "0, the same in every run"),
    "presence_penalty": ("subtracted from the logit of every token in the answer, from -2 to 2", "0, off"),
    "frequency_penalty": ("subtracted from a token's logit for each occurrence in the answer, from -2 to 2", "0, off"),
    "repetition_penalty": (
        "divides the positive logits of tokens in prompt and answer, multiplies negative ones, from 0.01 to 100",
        "1, off",
    ),
    "logprobs": (
        "write log-probabilities of the answer's tokens and of this number of likeliest tokens, 0 to 20",
        "none",
    ),
    "prompt_logprobs": ("the same for the prompt, 0 to 20", "none"),
    "n": ("independent answers to each prompt, 1 to 128", ""),
}
ACCEPTANCE = {
    "acceptance": ("acceptance rule of draft tokens: exact changes no token, typical is lossy and faster", ""),
    "epsilon": ("posterior threshold of typical acceptance, from 0 to 1", ""),
    "delta": ("posterior alpha of typical acceptance, from 0 to 1", ""),
}
FLAG_OF = {"n": "samples"}  # torchrun would parse --n as an abbreviation of its own flags


@dataclass(frozen=True)
class Prepared:
    """Inputs and outputs that are opened before the model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    jobs: list[offline.Job]
    out: TextIO


def parser() -> FlagParser:
    """Return the parser of all flags."""
    found = FlagParser(description=__doc__)
    files = found.add_argument_group("files")
    lines = 'JSONL of {"id", "prompt" or "prompt_tokens", "max_tokens" if needed} (required)'
    files.add_argument("--prompts", type=Path, required=True, metavar="FILE", help=lines)
    answers = "JSONL of answers, in input order; overwritten (required)"
    files.add_argument("--out", type=Path, required=True, metavar="FILE", help=answers)
    sampling = found.add_argument_group("sampling; see docs/protocol.md")
    acceptance = found.add_argument_group("acceptance of draft tokens; see docs/protocol.md")
    for group, table in ((sampling, SAMPLING), (acceptance, ACCEPTANCE)):
        for name, (text, default) in table.items():
            value = getattr(SamplingParams, name)
            kind: type = int if value is None else type(value)
            flag, words = f"--{FLAG_OF.get(name, name).replace('_', '-')}", f"{text} (default: {default or value})"
            shape: dict[str, Any] = {"choices": ACCEPTANCE_RULES} if kind is str else {"metavar": METAVARS[kind]}
            group.add_argument(flag, dest=name, type=KINDS.get(kind, kind), default=value, help=words, **shape)
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="continue after end-of-sequence tokens (default: end there)"
    )
    add_flags(found, EngineConfig)
    found.add_argument(
        "--no-speculation", action="store_true", help="one token per step; same as --tree off (default: as --tree says)"
    )
    return found


@contextlib.contextmanager
def opened(config: EngineConfig, args: argparse.Namespace) -> Iterator[Prepared]:
    """Read parameters, prompts and tokenizer and open the file of answers.

    Raises ValueError, naming the flag or file, for everything that can be refused without the model.
    """
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
    """Answer all prompts and print the results as JSON. SIGINT and SIGTERM stop it between two steps."""
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # between two steps no other rank is waiting
        signal.signal(number, lambda *_: interrupted.set())
    if Path(prepared.out.name).is_file():  # keeps an earlier run's answers until here; a pipe cannot be truncated
        prepared.out.truncate(0)
    summary = offline.generate(engine, prepared.jobs, prepared.tokenizer, prepared.out, interrupted.is_set)
    print(json.dumps(summary), flush=True)


def main() -> int:
    """Run the command line and return this rank's exit code."""
    args = parser().parse_args()

    def config() -> EngineConfig:
        engine = from_flags(EngineConfig, args)
        return dataclasses.replace(engine, tree="off") if args.no_speculation else engine

    return run_worker(config, lambda engine: opened(engine, args), lead)


if __name__ == "__main__":
    leave(main())
