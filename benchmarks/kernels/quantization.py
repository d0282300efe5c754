"""Quality of quantized weights: loss on held-out code, and how often the argmax token is unchanged.

``python -m euryale.benchmarks.kernels.quantization --model demo/model`` runs windows of the standard library's held-out
files through the serving decoder, once per quantization. It also decodes prompts to measure the tokens per step.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.compare.peers import run_engine, steps_of
from euryale.benchmarks.heads import held_out_windows
from euryale.benchmarks.prompts import code_prompts
from euryale.frontend.tokenizer import load_tokenizer
from euryale.kernels.linear.quantize import QUANTIZATIONS
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.model.config import DTYPES
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan


@torch.inference_mode()
def logits_of(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [T, vocabulary] of a text, run as one prompt."""
    runner = engine.runner
    size, decoder = runner.cache.page_size, runner.decoder
    segment = Segment(
        tokens=tokens.numpy().astype(np.int32),
        parents=np.zeros(0, dtype=np.int32),
        pages=np.arange(-(-len(tokens) // size), dtype=np.int32),
        context=0,
        emits_tokens=False,
        wants_head_candidates=False,
        output_index=0,
        params=SamplingParams(),
    )
    batch = StepBatch.of(StepPlan(segments=[segment]), size, tokens.device)
    hidden = decoder.transform(decoder.embed_tokens(batch.tokens), runner.cache, batch.metadata)
    return decoder.logits(hidden)[:, : decoder.shard.vocab_size].float()


def main(args: argparse.Namespace) -> None:
    windows, tokenizer = held_out_windows(args.model), load_tokenizer(args.model)
    prompts = [tokenizer.encode(text) for text in code_prompts(args.prompts)]
    # The first document of every window.
    texts = [
        windows.tokens[i][windows.documents[i] == windows.documents[i][0]] for i in windows.spaced_indices(args.windows)
    ]
    texts = [torch.from_numpy(text.astype(np.int64)) for text in texts]
    report: dict[str, Any] = {"dtype": args.dtype, "tokens": sum(map(len, texts)), "variants": {}}
    argmax: list[torch.Tensor] = []  # without quantization
    for kind in ("none", *args.quantizations):
        engine = Engine(EngineConfig(model=args.model, dtype=args.dtype, quantization=kind), single())
        loss, count, same = 0.0, 0, 0
        for i, tokens in enumerate(texts):
            logits = logits_of(engine, tokens)[:-1]
            loss += float(F.cross_entropy(logits, tokens[1:], reduction="sum"))
            count += len(logits)
            if kind == "none":
                argmax.append(logits.argmax(dim=1))
            same += int((logits.argmax(dim=1) == argmax[i]).sum())
        round_ = run_engine(engine, prompts, args.max_tokens, 1)
        tokens_per_step = sum(map(len, round_.answers)) / steps_of(round_)
        found = {"loss": round(loss / count, 4), "same_argmax": round(same / count, 4)}
        report["variants"][kind] = found | {"tokens_per_step": round(tokens_per_step, 3)}
        print(kind, report["variants"][kind], flush=True)
    print(json.dumps(report))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS[1:], default=["int8", "int4"])
    parser.add_argument("--windows", type=number(1), default=64, help="windows of 512 tokens")
    parser.add_argument("--prompts", type=number(1), default=16)
    parser.add_argument("--max-tokens", type=number(1), default=128)
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
