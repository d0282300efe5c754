"""Targets and losses against their definitions, position by position."""

import pytest
import torch

from euryale.training import losses
from euryale.training.packing import Batch

VOCAB, HIDDEN = 17, 6


@pytest.fixture
def batch():
    """Two windows: three documents, the second of which starts outside the loss mask, and a document with padding."""
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    learned = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]]).bool()
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, learned, documents, torch.zeros_like(tokens), torch.arange(2))


@pytest.mark.parametrize("head", [-1, 0, 1, 3])
@pytest.mark.parametrize("labels", ["text", "backbone"])
def test_targets_by_definition(batch, head, labels):
    """Head k at t learns token t + 2 + k if it is in the loss mask and in t's document; head -1 is the backbone."""
    argmax = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    found = losses.next_tokens(batch, argmax if labels == "backbone" else None)
    if head >= 0:
        found = losses.head_targets(found, batch.documents, head)
    for row in range(2):
        for t in range(12):
            wanted, target = losses.IGNORED, t + 2 + head
            if target < 12 and batch.learned[row, target] and batch.documents[row, target] == batch.documents[row, t]:
                wanted = int(batch.tokens[row, target] if labels == "text" else argmax[row, target - 1])
            assert found[row, t] == wanted, (row, t)


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(2)
    lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
    x, teacher = (torch.randn(3, 5, HIDDEN, generator=generator) for _ in range(2))
    targets = torch.randint(VOCAB, (3, 5), generator=generator)
    targets[0, 2:] = losses.IGNORED
    return lm_head, x, teacher, targets


def test_sums_by_definition(parts):
    lm_head, x, teacher, targets = parts
    has_target = targets >= 0
    student, teacher_logprobs = lm_head(x)[has_target].log_softmax(-1), lm_head(teacher)[has_target].log_softmax(-1)
    found = losses.cross_entropy(lm_head, x, targets, VOCAB)
    torch.testing.assert_close(found, -student.gather(1, targets[has_target][:, None]).sum())
    found = losses.divergence(lm_head, x, teacher, targets, VOCAB)
    torch.testing.assert_close(found, (teacher_logprobs.exp() * (teacher_logprobs - student)).sum())
    assert losses.divergence(lm_head, x, x, targets, VOCAB).abs() < 1e-5
    order = lm_head(x)[has_target].argsort(-1, descending=True).tolist()
    ranks = [row.index(int(t)) for row, t in zip(order, targets[has_target], strict=True)]
    assert losses.count_ranks(lm_head, x, targets, VOCAB).tolist() == [ranks.count(r) for r in range(losses.TOP_RANKS)]
    assert torch.equal(losses.argmax_tokens(lm_head, x, VOCAB), lm_head(x).argmax(-1))


def test_chunks_change_neither_losses_nor_gradients(parts, monkeypatch):
    """Chunks add sums in another order, which changes the last bits of float32: 1e-6 of values around 10."""
    lm_head, x, teacher, targets = parts
    functions = {
        "cross_entropy": lambda x: losses.cross_entropy(lm_head, x, targets, VOCAB),
        "divergence": lambda x: losses.divergence(lm_head, x, teacher, targets, VOCAB),
        "hits": lambda x: losses.count_ranks(lm_head, x, targets, VOCAB),
        "argmax_tokens": lambda x: losses.argmax_tokens(lm_head, x, VOCAB),
    }
    found = {}
    for chunk in (1 << 26, 4 * VOCAB):
        monkeypatch.setattr(losses, "_CHUNK", chunk)
        for name, function in functions.items():
            leaf, lm_head.weight.grad = x.clone().requires_grad_(), None
            value = function(leaf)
            if value.requires_grad:
                value.backward()
                value = (value.detach(), leaf.grad, lm_head.weight.grad.clone())
            found.setdefault(name, []).append(value)
    for name, (whole, chunked) in found.items():
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
