"""Token identity: greedy float32 tokens of transformers, plain decoding and trees, at every group size and batch size.

``python -m euryale.benchmarks.compare.identity --model DIR --medusa DIR --gsm8k gsm8k_test.jsonl`` runs
``launch/generate.py`` under torchrun for every setting. The exit code is 1 if any answer differs beyond rounding.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from euryale.benchmarks.compare.oracle import Oracle
from euryale.benchmarks.prompts import code_prompts, gsm8k_prompts
from euryale.frontend.tokenizer import load_tokenizer

GENERATE = Path(__file__).resolve().parents[2] / "launch" / "generate.py"


def run_setting(
    args: argparse.Namespace, prompts: Path, size: int, num_seqs: int, speculate: bool
) -> tuple[list, dict]:
    """Return the answers and the summary of one run of launch/generate.py."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), str(GENERATE)]
        command += ["--model", args.model, "--medusa", args.medusa, "--prompts", str(prompts), "--out", str(out)]
        command += ["--dtype", "float32", "--max-tokens", str(args.max_tokens), "--max-num-seqs", str(num_seqs)]
        command += ["--tree", args.tree] if speculate else ["--no-speculation"]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows = [json.loads(line) for line in out.read_text().split("\n") if line]
        return rows, json.loads(result.stdout.splitlines()[-1])


def settings(args: argparse.Namespace) -> list[tuple[int, int, bool]]:
    """Return (group size, max_num_seqs, speculation): plain decoding on one rank, trees on every group size."""
    plain = [(1, n, False) for n in args.max_num_seqs]
    return plain + [(size, n, True) for size in args.sizes for n in args.max_num_seqs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--tree", default="dynamic")
    parser.add_argument("--gsm8k", type=Path, help="JSONL of GSM8K questions, additional prompts")
    parser.add_argument("--count", type=int, default=50, help="prompts per source")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--max-num-seqs", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    tokenizer, oracle = load_tokenizer(args.model), Oracle(args.model)
    texts = code_prompts(args.count) + (gsm8k_prompts(args.gsm8k, args.count) if args.gsm8k else [])
    prompts = [tokenizer.encode(text) for text in texts]
    expected = [oracle.greedy(p, args.max_tokens) for p in prompts]
    table: list[dict[str, Any]] = []
    largest_gap = 0.0
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for i, prompt in enumerate(prompts):
            file.write(json.dumps({"id": i, "prompt_tokens": prompt}) + "\n")
        file.flush()
        for size, num_seqs, speculate in settings(args):
            rows, summary = run_setting(args, Path(file.name), size, num_seqs, speculate)
            answers = zip(prompts, expected, rows, strict=True)
            ties = [tie for p, e, row in answers if (tie := oracle.compare(p, e, row["tokens"]))]
            wrong = [tie for tie in ties if not tie.is_rounding]
            largest_gap = max([largest_gap, *(tie.gap for tie in ties)])
            kind = "tree" if speculate else "plain"
            line = f"group {size}  max-num-seqs {num_seqs:>2}  {kind:<5}  same {len(rows) - len(ties)}/{len(rows)}"
            line += (
                f"  ties {len(ties) - len(wrong)}  wrong {len(wrong)}  {summary['mean_acceptance_length']:.3f} per step"
            )
            print(line, flush=True)
            for tie in ties:
                print(f"    at {tie.position}: gap {tie.gap:.2e}, discrepancy {tie.discrepancy:.2e}", flush=True)
            table.append(
                {"size": size, "max_num_seqs": num_seqs, "speculation": speculate, "same": len(rows) - len(ties)}
            )
            table[-1] |= {"ties": len(ties) - len(wrong), "wrong": len(wrong)}
    print(
        json.dumps({"prompts": len(prompts), "max_tokens": args.max_tokens, "largest_gap": largest_gap, "runs": table})
    )
    return int(any(row["wrong"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
