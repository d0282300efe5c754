"""The training loop of both methods: batches, steps, measurements, checkpoints and log.

The caller decides which parameters are trained and how the losses are weighted. Shape suffixes: K heads, R ranks.
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
from euryale.training.model import LossSums, MedusaModel
from euryale.training.options import TrainOptions, changed
from euryale.training.packing import Batch, Windows, order

logger = logging.getLogger("euryale.training")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training run.

    ``weights(step)`` float32 [1 + K] weights the losses of the backbone and the heads. ``hidden(batch)`` reads stored
    hidden states [B, L, D] of a frozen backbone.
    """

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
        """Optimizer steps of the whole training."""
        return self.options.steps(len(self.windows), self.group.size)

    def autocast(self) -> torch.autocast:
        """Return a context that runs linear layers in bfloat16 if the options ask for it."""
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")


def learning_rate_factor(step: int, steps: int, options: TrainOptions) -> float:
    """Return the learning rate's factor at ``step``: linear warm-up, then constant or a half cosine to zero."""
    warmup = min(options.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(options: TrainOptions, *parts: tuple[float, torch.nn.Module]) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of ``parts``, pairs of learning rate and module."""
    groups = []
    for lr, module in parts:
        groups.append({"params": [p for p in module.parameters() if p.requires_grad], "lr": lr, "base_lr": lr})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=options.weight_decay)


def batches(training: Training, step: int) -> list[Batch]:
    """Return this rank's batches of a step, one per accumulation.

    Together, the ranks' batches are the next windows of the order, for every number of ranks.
    """
    options, group = training.options, training.group
    count = options.windows_per_step(group.size)
    indices = order(len(training.windows), step * count, count, options.seed)
    own = indices[group.own_items(count)]
    parts = own.reshape(options.accumulate, options.batch)
    return [training.windows.batch(part).to(group.device) for part in parts]


def train_step(training: Training, step: int) -> torch.Tensor:
    """Run one optimizer step and return the mean losses over all ranks and batches, nats, float32 [1 + K]."""
    model, group, options = training.model, training.group, training.options
    parts = batches(training, step)
    # Every target has the same weight, independent of the number of ranks and batches.
    targets = torch.stack([losses.num_targets(part, len(model.heads)) for part in parts]).sum(0)
    counts = group.all_reduce(targets.float()).clamp(min=1)
    total = torch.zeros_like(counts)
    for part in parts:
        with training.autocast():
            sums: LossSums = model(part, training.hidden(part) if training.hidden else None)
        means = sums.losses / counts
        # FSDP divides gradients by the number of ranks, but the counts already cover all ranks.
        ((means * training.weights(step).to(means.device)).sum() * group.size).backward()
        total += means.detach()
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(parameters, options.clip)
    factor = learning_rate_factor(step, training.steps, options)
    for settings in training.optimizer.param_groups:
        settings["lr"] = settings["base_lr"] * factor
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return group.all_reduce(total)


def measure(training: Training) -> dict:
    """Measure held-out text; the result is the same on every rank.

    Returns ``backbone_loss`` and ``head_losses`` in nats per token, and ``top`` [K][R], the top-1 to top-R accuracy of
    every head.
    """
    windows, group = training.held_out, training.group
    indices = windows.spaced_indices(training.options.held_out_windows)
    # FSDP requires the same number of model runs on every rank, so a few windows may be measured twice.
    indices = np.resize(indices, math.ceil(len(indices) / group.size) * group.size)
    found: LossSums | None = None
    counts = torch.zeros(1 + len(training.model.heads), dtype=torch.int64, device=group.device)
    for index in indices[group.own_items(len(indices))]:
        batch = windows.batch(np.asarray([index])).to(group.device)
        with training.autocast():
            sums = training.model(batch, task="measure")
        found = sums if found is None else LossSums(*(a + b for a, b in zip(found, sums, strict=True)))
        counts += losses.num_targets(batch, len(training.model.heads))
    assert found is not None, "there are held-out windows"
    total, rank_counts, counts = (group.all_reduce(part.float()) for part in (*found, counts))
    means = (total / counts.clamp(min=1)).tolist()
    top = (rank_counts.cumsum(1) / counts[1:, None].clamp(min=1)).tolist()
    return {"backbone_loss": means[0], "head_losses": means[1:], "top": [[round(a, 4) for a in row] for row in top]}


def train(training: Training, out: Path) -> dict:
    """Run the remaining steps.

    Returns, on the leader, the last measurement with ``first``, the measurement before training; an empty dictionary on
    other ranks. Writes checkpoints to ``out/state``, the log to ``out/log.csv`` and the plot to ``out/losses.png``.
    ValueError if the loss becomes infinite or NaN.
    """
    options, group, steps = training.options, training.group, training.steps
    first = fsdp.load_checkpoint(out / "state", training.model, training.optimizer, group)
    with group.agreed():
        journal = Journal(out, len(training.model.heads), first) if group.is_leader else None
    if first == 0:
        _measure_and_log(training, journal, 0)
    elif group.is_leader:
        state = "is complete" if first == steps else "continues from its checkpoint"
        logger.info("%s: training %s at step %d of %d", out, state, first, steps)
    num_tokens = options.windows_per_step(group.size) * options.length
    started = time.monotonic()
    with tqdm(total=steps, initial=first, desc=out.name, unit="step", disable=not group.is_leader) as bar:
        for step in range(first, steps):
            found = train_step(training, step).tolist()
            if not all(map(math.isfinite, found)):  # the losses are the same on every rank
                raise ValueError(f"the loss is not finite at step {step + 1}: lower --lr and give another --out")
            rate = (step + 1 - first) * num_tokens / (time.monotonic() - started)
            if journal:
                learning_rate = training.optimizer.param_groups[0]["lr"]
                journal.log_step(step + 1, found, (step + 1) * num_tokens, learning_rate, rate)
            bar.set_postfix_str(f"loss {sum(found):.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
            if (step + 1) % options.checkpoint_steps == 0 or step + 1 == steps:
                _measure_and_log(training, journal, step + 1)
                fsdp.save_checkpoint(out / "state", training.model, training.optimizer, step + 1, group)
                if journal:
                    journal.draw()
    return journal.last | {"first": journal.first, "steps": steps, "tokens": steps * num_tokens} if journal else {}


def _measure_and_log(training: Training, journal: Journal | None, step: int) -> None:
    """Measure held-out text on all ranks and log it on the leader."""
    found = measure(training)
    if journal:
        journal.log_measurement(step, found)


def store_options(options: TrainOptions, out: Path, group: Group) -> None:
    """Store the options in ``out/options.json``.

    ValueError on every rank if ``out`` holds a checkpoint of a training with other options, or cannot be written.
    """
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
                    f"{out} holds a training with other settings ({', '.join(differing)}): give those, or another --out"
                )
        path.write_text(json.dumps(settings, indent=1) + "\n")


def report(args: TrainOptions, training: Training, found: dict, seconds: float) -> dict:
    """Write ``report.json`` and return its content on the leader; an empty dictionary on other ranks."""
    if not training.group.is_leader:
        return {}
    content = {"steps": found["steps"], "tokens": found["tokens"], "world_size": training.group.size}
    content |= {"seconds": round(seconds, 1), "backbone_bytes": size_in_bytes(training.model.backbone)}
    content |= {name: found[name] for name in ("backbone_loss", "head_losses", "top", "first")}
    Path(args.out, "report.json").write_text(json.dumps(content, indent=1) + "\n")
    return content
