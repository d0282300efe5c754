"""The training loop that both methods run: batches, steps, measurements, checkpoints, log.

What is trained is a MedusaModel and an optimizer; which parts of it learn, and with what weight, its caller decides.
Shape suffixes: K heads, R ranks.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.training.journal import Journal
from euryale.training.model import MedusaModel, Sums
from euryale.training.options import TrainOptions
from euryale.training.packing import Batch, Windows, order


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: ``weights(step)`` float32 [1 + K] are those of the backbone's and the heads' losses;
    ``hidden(batch)`` reads stored hidden states of a frozen backbone."""

    options: TrainOptions
    group: Group
    model: MedusaModel
    optimizer: torch.optim.Optimizer
    windows: Windows
    held_out: Windows
    weights: Callable[[int], torch.Tensor]
    hidden: Callable[[Batch], torch.Tensor] | None = None

    @property
    def steps(self) -> int:
        return self.options.steps(len(self.windows), self.group.size)

    def autocast(self) -> torch.autocast:
        """Linear layers in bfloat16 if the options say so."""
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Factor of the learning rate: a linear warm-up, then a half cosine to zero, or constant."""
    warmup = min(options.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(training: Training, step: int) -> list[Batch]:
    """This rank's batches of a step, one for each accumulation. All ranks' together are the next windows of the order,
    whatever the number of ranks."""
    options, group = training.options, training.group
    count = options.batch * options.accumulate * group.size
    indices = order(len(training.windows), step * count, count, options.seed)
    mine = indices[group.share(count)]
    parts = mine.reshape(options.accumulate, options.batch)
    return [training.windows.batch(part).to(group.device) for part in parts]


def num_targets(batch: Batch, num_heads: int) -> torch.Tensor:
    """Positions with a target of the backbone and of every head, float32 [1 + K]."""
    documents, learned = batch.documents, batch.learned
    counts = []
    for ahead in range(1, num_heads + 2):
        counts.append((learned[:, ahead:] & (documents[:, ahead:] == documents[:, :-ahead])).sum())
    return torch.stack(counts).float()


def train_step(training: Training, step: int) -> torch.Tensor:
    """One optimizer step; mean losses over all ranks and batches, float32 [1 + K]."""
    model, group, options = training.model, training.group, training.options
    parts = batches(training, step)
    # Every target weighs the same wherever it lies, so that the number of ranks does not matter.
    counts = group.all_reduce(sum(num_targets(part, len(model.heads)) for part in parts)).clamp(min=1)
    total = torch.zeros_like(counts)
    for part in parts:
        with training.autocast():
            sums: Sums = model(part, training.hidden(part) if training.hidden else None)
        means = sums.losses / counts
        # FSDP averages gradients over the ranks: undo the division, the counts are of all ranks already.
        ((means * training.weights(step).to(means.device)).sum() * group.size).backward()
        total += means.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, options.clip)
    factor = learning_rate(step, training.steps, options)
    for parameters in training.optimizer.param_groups:
        parameters["lr"] = parameters["base_lr"] * factor
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return group.all_reduce(total)


def measure(training: Training) -> dict:
    """Held-out losses in nats, ``backbone_loss`` against the text and ``head_losses``, and ``top``: how often the
    token is among a head's 1 to R likeliest, [K][R]. The same on every rank."""
    windows, group = training.held_out, training.group
    chosen = windows.chosen(training.options.held_out_windows)
    # Every rank runs the model equally often; a window measured twice at the end is the price.
    chosen = np.resize(chosen, math.ceil(len(chosen) / group.size) * group.size)
    found: Sums | None = None
    for index in chosen[group.share(len(chosen))]:
        batch = windows.batch(np.asarray([index])).to(group.device)
        with training.autocast():
            sums = training.model(batch, task="measure")
        found = sums if found is None else Sums(*(a + b for a, b in zip(found, sums, strict=True)))
    losses, counts, hits = (group.all_reduce(part.float()) for part in found)
    means = (losses / counts.clamp(min=1)).tolist()
    top = (hits.cumsum(1) / counts[1:, None].clamp(min=1)).tolist()
    return {"backbone_loss": means[0], "head_losses": means[1:], "top": [[round(a, 4) for a in row] for row in top]}


def train(training: Training, out: Path) -> dict:
    """Run what is left of the training; returns the last measurement with ``first``, the one before training.

    A checkpoint lies in ``out/state``, the log in ``out/log.csv``, the curves in ``out/losses.png``.
    """
    options, group, steps = training.options, training.group, training.steps
    first = fsdp.load_checkpoint(out / "state", training.model, training.optimizer, group)
    journal = Journal(out, len(training.model.heads), first, group.is_leader)
    if first == 0:
        journal.measured(0, measure(training))
    num_tokens = options.batch * options.accumulate * group.size * options.length
    started = time.monotonic()
    with tqdm(total=steps, initial=first, desc=out.name, unit="step", disable=not group.is_leader) as bar:
        for step in range(first, steps):
            losses = train_step(training, step).tolist()
            rate = (step + 1 - first) * num_tokens / (time.monotonic() - started)
            journal.trained(step + 1, losses, (step + 1) * num_tokens, learning_rate(step, steps, options), rate)
            bar.set_postfix_str(f"loss {sum(losses):.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
            if (step + 1) % options.checkpoint_steps == 0 or step + 1 == steps:
                journal.measured(step + 1, measure(training))
                fsdp.save_checkpoint(out / "state", training.model, training.optimizer, step + 1, group)
                journal.draw()
    return journal.last | {"first": journal.first, "steps": steps, "tokens": steps * num_tokens}


def remember(options: TrainOptions, out: Path, group: Group, changed: Callable) -> None:
    """Store the settings in ``out/options.json``. ValueError on every rank if a training with others lies there, or
    nothing can be written."""
    error = None
    if group.is_leader:
        try:
            (out / "state").mkdir(parents=True, exist_ok=True)
            path = out / "options.json"
            if path.exists() and (differing := changed(options, json.loads(path.read_text()))):
                error = f"{out} holds a training with other settings ({', '.join(differing)}): give another --out"
            else:
                path.write_text(json.dumps(vars(options), indent=1) + "\n")
        except (OSError, json.JSONDecodeError) as problem:
            error = f"cannot use {out}: {problem}"
    try:
        group.agree(error)
    except RuntimeError as problem:
        raise ValueError(str(problem)) from None
