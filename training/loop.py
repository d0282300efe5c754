"""The training loop that both methods run: batches, steps, measurements, checkpoints, log.

What is trained is a MedusaModel and an optimizer; which parts of it learn, and with what weight, its caller decides.
Shape suffixes: K heads, R ranks.
"""

import json
import logging
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
from euryale.training import losses
from euryale.training.backbone import size_in_bytes
from euryale.training.journal import Journal
from euryale.training.model import MedusaModel, Sums
from euryale.training.options import TrainOptions, changed
from euryale.training.packing import Batch, Windows, order

logger = logging.getLogger("euryale.training")


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


def learning_rate_factor(step: int, steps: int, options: TrainOptions) -> float:
    """What the learning rate is multiplied by: a linear warm-up, then a half cosine to zero, or constant."""
    warmup = min(options.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(options: TrainOptions, *parts: tuple[float, torch.nn.Module]) -> torch.optim.AdamW:
    """AdamW over what has gradients in the parts, each a learning rate and a module."""
    groups = []
    for lr, module in parts:
        groups.append({"params": [p for p in module.parameters() if p.requires_grad], "lr": lr, "base_lr": lr})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=options.weight_decay)


def batches(training: Training, step: int) -> list[Batch]:
    """This rank's batches of a step, one for each accumulation. All ranks' together are the next windows of the order,
    whatever the number of ranks."""
    options, group = training.options, training.group
    count = options.windows_per_step(group.size)
    indices = order(len(training.windows), step * count, count, options.seed)
    mine = indices[group.own_items(count)]
    parts = mine.reshape(options.accumulate, options.batch)
    return [training.windows.batch(part).to(group.device) for part in parts]


def train_step(training: Training, step: int) -> torch.Tensor:
    """One optimizer step; mean losses over all ranks and batches, float32 [1 + K]."""
    model, group, options = training.model, training.group, training.options
    parts = batches(training, step)
    # Every target weighs the same wherever it lies, so that the number of ranks does not matter.
    targets = sum(losses.num_targets(part, len(model.heads)) for part in parts)
    counts = group.all_reduce(targets.float()).clamp(min=1)
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
    factor = learning_rate_factor(step, training.steps, options)
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
    found, counts = None, 0
    for index in chosen[group.own_items(len(chosen))]:
        batch = windows.batch(np.asarray([index])).to(group.device)
        with training.autocast():
            sums = training.model(batch, task="measure")
        found = sums if found is None else Sums(*(a + b for a, b in zip(found, sums, strict=True)))
        counts = counts + losses.num_targets(batch, len(training.model.heads))
    total, hits, counts = (group.all_reduce(part.float()) for part in (*found, counts))
    means = (total / counts.clamp(min=1)).tolist()
    top = (hits.cumsum(1) / counts[1:, None].clamp(min=1)).tolist()
    return {"backbone_loss": means[0], "head_losses": means[1:], "top": [[round(a, 4) for a in row] for row in top]}


def train(training: Training, out: Path) -> dict:
    """Run what is left of the training; returns, on the leader, the last measurement with ``first``, the one before
    training, and elsewhere nothing.

    A checkpoint lies in ``out/state``, the log in ``out/log.csv``, the curves in ``out/losses.png``.
    """
    options, group, steps = training.options, training.group, training.steps
    first = fsdp.load_checkpoint(out / "state", training.model, training.optimizer, group)
    with group.agreed():
        journal = Journal(out, len(training.model.heads), first) if group.is_leader else None
    if first == 0:
        _measured(training, journal, 0)
    elif group.is_leader:
        state = "is done already" if first == steps else "goes on from its checkpoint"
        logger.info("%s: this training %s at step %d of %d", out, state, first, steps)
    num_tokens = options.windows_per_step(group.size) * options.length
    started = time.monotonic()
    with tqdm(total=steps, initial=first, desc=out.name, unit="step", disable=not group.is_leader) as bar:
        for step in range(first, steps):
            found = train_step(training, step).tolist()
            if not all(map(math.isfinite, found)):  # the same on every rank
                raise ValueError(f"the loss is not finite at step {step + 1}: lower --lr and begin with another --out")
            rate = (step + 1 - first) * num_tokens / (time.monotonic() - started)
            if journal:
                learning_rate = training.optimizer.param_groups[0]["lr"]
                journal.trained(step + 1, found, (step + 1) * num_tokens, learning_rate, rate)
            bar.set_postfix_str(f"loss {sum(found):.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
            if (step + 1) % options.checkpoint_steps == 0 or step + 1 == steps:
                _measured(training, journal, step + 1)
                fsdp.save_checkpoint(out / "state", training.model, training.optimizer, step + 1, group)
                if journal:
                    journal.draw()
    return journal.last | {"first": journal.first, "steps": steps, "tokens": steps * num_tokens} if journal else {}


def _measured(training: Training, journal: Journal | None, step: int) -> None:
    found = measure(training)
    if journal:
        journal.measured(step, found)


def remember(options: TrainOptions, out: Path, group: Group) -> None:
    """Store the settings in ``out/options.json``. ValueError on every rank if a training with others has a checkpoint
    there, or nothing can be written."""
    with group.agreed():
        if options.compile and group.size > 1:
            raise ValueError("--compile works on one rank only: leave it out")
        if not group.is_leader:
            return
        (out / "state").mkdir(parents=True, exist_ok=True)
        path = out / "options.json"
        settings = vars(options) | {"windows_per_step": options.windows_per_step(group.size)}
        if fsdp.latest_checkpoint(out / "state") and path.exists():
            differing = changed(settings, json.loads(path.read_text()))
            if differing:
                raise ValueError(
                    f"{out} holds a training with other settings ({', '.join(differing)}): give these, or another --out"
                )
        path.write_text(json.dumps(settings, indent=1) + "\n")


def report(args: TrainOptions, training: Training, found: dict, seconds: float) -> dict:
    """Write and return the numbers of ``report.json``, on the leader; elsewhere they are empty."""
    if not training.group.is_leader:
        return {}
    rounded = {"steps": found["steps"], "tokens": found["tokens"], "world_size": training.group.size}
    rounded |= {"seconds": round(seconds, 1), "backbone_bytes": size_in_bytes(training.model.backbone)}
    rounded |= {name: found[name] for name in ("backbone_loss", "head_losses", "top", "first")}
    Path(args.out, "report.json").write_text(json.dumps(rounded, indent=1) + "\n")
    return rounded
