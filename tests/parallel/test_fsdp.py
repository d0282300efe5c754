"""Shards and checkpoints of a training, on one rank and on two."""

import resource
from contextlib import contextmanager

import pytest
import torch

from euryale.parallel import fsdp
from euryale.parallel.group import single


class Stack(torch.nn.Module):
    """Two blocks and something around them, a frozen part among it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(7, 6)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.embedding.requires_grad_(False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x).tanh()
        return x


def trained(group, whole: bool = False):
    """A stack on this group after one step of AdamW."""
    model = Stack()
    fsdp.shard_parameters(model, model.blocks, [model.embedding] if whole else [], False, group)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(group, directory, step):
    model, optimizer = trained(group)
    fsdp.save_checkpoint(directory, model, optimizer, step, group)
    return fsdp.whole_state(model)


def load(group, directory):
    model = Stack()
    fsdp.shard_parameters(model, model.blocks, [], False, group)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step = fsdp.load_checkpoint(directory, model, optimizer, group)
    return step, fsdp.whole_state(model)


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_any_number_of_ranks_goes_on_from_a_checkpoint(ranks, tmp_path, writers, readers):
    assert fsdp.latest_checkpoint(tmp_path) is None
    for step in (3, 12):
        written = ranks(writers).run(save, tmp_path, step)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-12"]
    step, found = ranks(readers).run(load, tmp_path)[0]
    assert step == 12
    assert set(found) == {f"blocks.{i}.{name}" for i in range(2) for name in ("weight", "bias")}  # what is trained
    for name, tensor in found.items():
        assert torch.equal(tensor, written[name]), name


def test_whole_parts_stay_whole(ranks):
    """Only the leader gathers the state; every rank has the part that is not shared out."""
    found = ranks(2).run(whole_parts)
    assert found == [True, True]


def whole_parts(group):
    model, _ = trained(group, whole=True)
    return type(model.embedding.weight) is torch.nn.Parameter and tuple(model.embedding.weight.shape) == (7, 6)


def test_nodes_that_do_not_share_the_directory_are_told(ranks, tmp_path):
    save(single(), tmp_path / "0", 4)
    assert all("nodes must share this directory" in text for text in ranks(2).run(load_own, tmp_path))


def load_own(group, directory):
    try:
        load(group, directory / str(group.rank))
    except ValueError as error:
        return str(error)
    return ""


def test_a_damaged_checkpoint_is_named(tmp_path):
    save(single(), tmp_path, 4)
    for file in (tmp_path / "step-4").glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="step-4 cannot be read: remove it to start from the beginning"):
        load(single(), tmp_path)


@contextmanager
def full_disk():
    """The kernel lets this process write no large files, as on a full disk. (Python ignores the signal of it.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_the_older_checkpoint_kept(tmp_path):
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    fsdp.save_checkpoint(tmp_path, model, optimizer, 1, single())
    message = "cannot write a checkpoint.*Free some space and run the same command again"
    with full_disk(), pytest.raises(ValueError, match=message):
        fsdp.save_checkpoint(tmp_path, model, optimizer, 2, single())
    assert fsdp.load_checkpoint(tmp_path, model, optimizer, single()) == 1
