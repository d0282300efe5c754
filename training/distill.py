"""First half of self-distillation: the backbone answers the prompts of the data, and the answers become training text
(Medusa paper, arXiv 2401.10774, section 2.3.2)."""

import json
from pathlib import Path

import numpy as np

from euryale.parallel.group import Group
from euryale.runtime.config import EngineConfig
from euryale.runtime.model.config import load_model_config
from euryale.scheduler.sampling_params import SamplingParams
from euryale.training import answers, options
from euryale.training.data import load_documents
from euryale.training.options import DistillOptions


def run(args: DistillOptions, group: Group) -> dict | None:
    """Write the answers to ``args.out``, a JSONL file, and return the leader's summary, None on other ranks.

    An interrupted run continues after the last complete line. ValueError for bad input.
    """
    config = EngineConfig(
        model=args.model,
        medusa=args.medusa,
        tree="" if args.medusa else "off",
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(512, args.max_num_seqs),
    )
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )
    out, done = Path(args.out), 0
    prompts: list[np.ndarray] = []
    with group.agreed():
        if group.is_leader:
            prompts = _prompts(args)
            _store_options(args, out)
            done = _truncate_to_whole_lines(out, prompts)
    if not group.is_leader:
        return answers.write_answers(config, group, [], params, None)
    with out.open("a", encoding="utf-8") as file:
        summary = answers.write_answers(config, group, prompts, params, file, done)
    assert summary is not None, "the leader has a summary"
    return summary | {"out": str(out), "answers": len(prompts)}


def _prompts(args: DistillOptions) -> list[np.ndarray]:
    config = load_model_config(args.model, "auto")
    documents, _, _ = load_documents(args, config.vocab_size, needs_held_out=False)
    return answers.select_prompts(documents, args.num_prompts, args.prompt_tokens, config.max_positions)


def _store_options(args: DistillOptions, out: Path) -> None:
    """Store the options beside ``out``. ValueError if ``out`` was begun with different options."""
    path = out.with_name(out.name + ".options.json")
    if out.exists() and path.exists() and (differing := options.changed(vars(args), json.loads(path.read_text()))):
        raise ValueError(
            f"{out} was begun with other settings ({', '.join(differing)}): remove it or give another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(vars(args), indent=1) + "\n")


def _truncate_to_whole_lines(out: Path, prompts: list[np.ndarray]) -> int:
    """Remove an incomplete last line and return the number of answers in ``out``. ValueError if they answer other
    prompts."""
    if not out.exists():
        return 0
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.decode().split("\n")[:-1]
    for line, prompt in zip(lines, prompts, strict=False):
        try:
            row = json.loads(line)
            is_answer = bool(row.get("error")) or row["prompt_tokens"] == prompt.tolist()
        except (ValueError, KeyError, TypeError, AttributeError):
            is_answer = False
        if not is_answer:
            raise ValueError(f"{out} answers other prompts: remove it or give another --out")
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)
