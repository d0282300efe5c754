"""Training on several ranks: FSDP2 sharding, and checkpoints from which any number of ranks can resume.

This file knows how a module's parameters are sharded and stored. It knows no loss and no data.
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

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
    """Moves ``model`` to the group's device and shards its parameters in place.

    The parameters of each of ``blocks`` are gathered when the block runs, all others when the model runs, in bfloat16
    with ``low_precision``. Gradients are summed in float32. Modules in ``whole`` are replicated on every rank. A group
    of one shards nothing.
    """
    for module in [model] if group.size == 1 else whole:
        module.to(group.device)
    if group.size == 1:
        return
    mesh = init_device_mesh(group.device.type, (group.size,))
    replicated = {p for module in whole for p in module.parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low_precision else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=replicated)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, gathered on the leader's CPU. Other ranks get an empty dictionary."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return cast("dict[str, torch.Tensor]", get_model_state_dict(model, options=options))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint that ``save_checkpoint`` wrote to ``directory``, or None."""
    found = [p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def save_checkpoint(directory: Path, model: nn.Module, optimizer: Optimizers, step: int, group: Group) -> None:
    """Writes the trained parameters and the optimizer's state to ``directory/step-N`` atomically and removes older
    checkpoints. ValueError on every rank if writing fails, for instance on a full disk; older checkpoints remain."""
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
    """Restores the newest checkpoint in place on any number of ranks and returns its number of steps, 0 if there is no
    checkpoint. ValueError if it cannot be read or the ranks see different checkpoints."""
    found = latest_checkpoint(directory)
    step = int(found.name.removeprefix("step-")) if found else 0
    if group.minimum(step) != -group.minimum(-step):
        raise ValueError(f"the ranks see different checkpoints in {directory}: all nodes must share this directory")
    if found is None:
        return 0
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    state: dict[str, Any] = {"weights": weights, "moments": moments}
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=found, no_dist=group.size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {found} cannot be read: remove it to start from the beginning ({error})"
        ) from error
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
    """Suppresses the warning that torch.distributed is disabled, which is expected in a group of one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _named(group: Group, directory: Path) -> Iterator[None]:
    """Runs a part of saving on every rank. ValueError on all of them, which says what to do, if it failed on any."""
    with group.agreed():
        try:
            yield
        except (OSError, CheckpointException) as problem:
            cause: BaseException = problem
            if isinstance(problem, CheckpointException):  # it wraps the exceptions of all ranks
                cause = next(iter(problem.failures.values()))[0]
            free = shutil.disk_usage(directory).free / 1e6
            raise ValueError(
                f"cannot write a checkpoint to {directory} ({free:.0f} MB free): {cause!r}. Free some space and run "
                "the same command again: it resumes from the previous checkpoint"
            ) from cause
