"""Prompts of the benchmarks: held-out code of the demo model's corpus, and GSM8K questions from a file."""

import json
from pathlib import Path

from euryale.training import corpus


def code_prompts(count: int, lines: int = 12) -> list[str]:
    """Return ``count`` prompts: the first ``lines`` lines from a ``def`` or ``class`` line of held-out standard library
    files, a few per file."""
    _, held_out = corpus.split(corpus.standard_library_files())
    per_file = -(-count // max(1, len(held_out))) + 2
    found: list[str] = []
    for path in held_out:
        text = corpus.read(path).splitlines()
        starts = [i for i, line in enumerate(text) if line.startswith(("def ", "class "))]
        selected = starts[:: max(1, len(starts) // per_file)][:per_file]
        found += ["\n".join(text[i : i + lines]) + "\n" for i in selected if i + lines < len(text)]
    # Spread over all files.
    step = max(1, len(found) // count)
    return found[::step][:count]


def gsm8k_prompts(path: Path, count: int) -> list[str]:
    """Return the first ``count`` questions of a GSM8K JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["question"] for _, line in zip(range(count), file, strict=False)]
