"""Offline generation: ``torchrun --nproc-per-node N launch/generate.py --model DIR --prompts IN --out OUT``.

Also runs without torchrun, as a group of one. The last line on stdout is one JSON object of figures.
"""

import argparse
import dataclasses
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # where nothing is installed, this checkout

from euryale.frontend.tokenizer import load_tokenizer
from euryale.runtime import offline
from euryale.runtime.config import EngineConfig
from euryale.runtime.flags import add_flags, from_flags
from euryale.runtime.worker import leave, run_worker
from euryale.scheduler.sampling_params import ACCEPTANCE_RULES, SamplingParams

# Numeric sampling parameters with their defaults, each a flag; docs/protocol.md explains them. All prompts of a file
# have the same priority and latency target, and torchrun would take --n for a flag of its own.
NUMBERS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(SamplingParams)
    if type(field.default) in (int, float, type(None)) and field.name not in ("n", "priority", "latency_target")
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL of {"id", "prompt" or "prompt_tokens"}')
    parser.add_argument("--out", type=Path, required=True, help="JSONL of answers, in input order")
    parser.add_argument("--no-speculation", action="store_true", help="one token a step; same as --tree off")
    for name, default in NUMBERS.items():
        kind = int if default is None else type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    parser.add_argument("--samples", type=int, dest="n", default=1, help="independent answers to each prompt")
    parser.add_argument("--acceptance", choices=ACCEPTANCE_RULES, default=SamplingParams.acceptance)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after end-of-sequence tokens")
    add_flags(parser, EngineConfig)
    return parser.parse_args()


def main() -> int:
    args = parse()

    def config() -> EngineConfig:
        engine = from_flags(EngineConfig, args)
        return dataclasses.replace(engine, tree="off") if args.no_speculation else engine

    def lead(engine) -> None:
        params = SamplingParams(**{name: getattr(args, name) for name in (*NUMBERS, "n", "acceptance", "ignore_eos")})
        interrupted = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # stop between two steps, when no other rank is waiting
            signal.signal(number, lambda *_: interrupted.set())
        tokenizer = load_tokenizer(args.model, engine.loaded.limits.vocab_size)
        jobs = []
        for job in offline.read_jobs(args.prompts, tokenizer, params):
            jobs.append(job)
            engine.keep_alive()
        try:
            out = args.out.open("w", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write the answers to {args.out}: {error}") from error
        with out:
            summary = offline.generate(engine, jobs, tokenizer, out, interrupted.is_set)
        print(json.dumps(summary), flush=True)

    return run_worker(config, lead)


if __name__ == "__main__":
    leave(main())
