"""Training on several ranks: FSDP2 shards, and checkpoints that any number of ranks can go on from.

This file knows how a module's parameters are shared out and stored; it knows no loss and no data.
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from euryale.parallel.group import Group

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
_TRAINED = StateDictOptions(ignore_frozen_params=True)


def shard_parameters(
    model: nn.Module, blocks: Iterable[nn.Module], whole: Iterable[nn.Module], low_precision: bool, group: Group
) -> None:
    """Move ``model`` to the group's device and share out its parameters in place: those of each of ``blocks`` are
    gathered when the block runs, the rest when the model does, in bfloat16 with ``low_precision`` (gradients are always
    summed in float32). Modules in ``whole`` stay whole on every rank. A group of one keeps all as it is."""
    for module in [model] if group.size == 1 else whole:
        module.to(group.device)
    if group.size == 1:
        return
    mesh = init_device_mesh(group.device.type, (group.size,))
    kept = {p for module in whole for p in module.parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low_precision else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=kept)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained by name, gathered on the leader's CPU; the other ranks get an empty dictionary."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint that ``save_checkpoint`` wrote."""
    found = [p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def save_checkpoint(directory: Path, model: nn.Module, optimizer: Optimizers, step: int, group: Group) -> None:
    """Write what is trained and the optimizer's state as ``directory/step-N``, complete or not at all, and remove
    older ones. ValueError, on every rank, if the disk is full: the older checkpoint is then still there."""
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    target = directory / f"step-{step}"
    unfinished = directory / f"unfinished-{step}"
    with _named(group, directory):
        if group.is_leader:
            for old in directory.glob("unfinished-*"):
                shutil.rmtree(old)
    with _named(group, directory), _quiet():
        dcp.save({"weights": weights, "moments": moments}, checkpoint_id=unfinished, no_dist=group.size == 1)
    with _named(group, directory):
        if group.is_leader:
            unfinished.rename(target)
            for old in directory.glob("step-*"):
                if old != target:
                    shutil.rmtree(old)


def load_checkpoint(directory: Path, model: nn.Module, optimizer: Optimizers, group: Group) -> int:
    """Restore the newest checkpoint in place, if there is one, on any number of ranks; the steps it has behind it."""
    found = latest_checkpoint(directory)
    step = int(found.name.removeprefix("step-")) if found else 0
    if group.minimum(step) != -group.minimum(-step):
        raise ValueError(f"not all ranks see the same checkpoint in {directory}: nodes must share this directory")
    if found is None:
        return 0
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    state = {"weights": weights, "moments": moments}
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=found, no_dist=group.size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the checkpoint {found} cannot be read: remove it to begin again ({error})") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["weights"],
        optim_state_dict=state["moments"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),  # frozen parameters are not stored
    )
    return step


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a group of one is a group of one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _named(group: Group, directory: Path) -> Iterator[None]:
    """Run a piece of saving on every rank; ValueError on all of them, saying what to do, if it failed on any."""
    with group.agreed():
        try:
            yield
        except (OSError, CheckpointException) as problem:
            if isinstance(problem, CheckpointException):  # it wraps what happened on each rank
                problem = next(iter(problem.failures.values()))[0]
            free = shutil.disk_usage(directory).free / 1e6
            raise ValueError(
                f"cannot write a checkpoint to {directory} ({free:.0f} MB free): {problem!r}. Make room and give the "
                "same command again: it goes on from the checkpoint before"
            ) from problem
