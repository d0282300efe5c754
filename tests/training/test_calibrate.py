"""Heads, ranks and trees of the training side against their definitions, on tiny models and made-up ranks."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from euryale.runtime import heads_format
from euryale.scheduler.tree import load_tree, search_tree
from euryale.training import answers, calibrate
from euryale.training.calibrate import NUM_RANKS, Continuations
from euryale.training.heads import WEIGHTS_NAME, Heads, heads_losses, look

HIDDEN, VOCAB = 16, 101


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def heads(backbone):
    torch.manual_seed(1)
    heads = Heads.like(backbone, 3, 2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return heads


def test_fresh_heads_say_what_the_backbone_says(backbone):
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        hidden = backbone.model(tokens).last_hidden_state
        for head in Heads.like(backbone, 4, 1):
            torch.testing.assert_close(head(hidden), backbone(tokens).logits)


def test_losses_look_two_and_more_tokens_ahead(backbone):
    """A head that is sure of the backbone's choice loses nothing only at the right distance."""
    tokens = torch.randint(VOCAB, (2, 12))
    hidden, choices = look(backbone, tokens)
    with torch.no_grad():
        assert torch.equal(choices, backbone(tokens).logits.argmax(-1))
    seen = []

    class Sure(torch.nn.Module):
        def forward(self, hidden):
            seen.append(hidden.shape[1])
            token_after_next = choices[:, len(seen) :]  # head k: the choice made at t + 1 + k is token t + 2 + k
            return 100.0 * torch.nn.functional.one_hot(token_after_next, VOCAB).float()

    losses = heads_losses([Sure() for _ in range(3)], hidden, choices)
    assert seen == [11, 10, 9]
    assert max(float(loss) for loss in losses) < 1e-6  # exp(-100) is lost beside 1 in float32


def test_saved_heads_are_read_by_the_runtime(heads, tmp_path):
    heads.save(tmp_path, "..")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, 2)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    parsed = heads_format.parse(tensors, "test", HIDDEN, VOCAB)
    assert (parsed.num_heads, parsed.num_layers, len(parsed.lm_heads)) == (3, 2, 3)
    loaded = Heads.load(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, heads.state_dict()[name].to(torch.bfloat16).float()), name


def test_greedy_continuation_equals_the_uncached_one(backbone):
    prompts = torch.randint(1, VOCAB, (3, 5))
    tokens = answers.continue_greedily(backbone, prompts, 8)
    expected = prompts
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, backbone(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, expected)


def test_ranks_are_places_among_the_sorted_guesses(backbone, heads):
    tokens = torch.randint(VOCAB, (2, 20))
    ranks = calibrate.ranks_along(backbone, heads, tokens)
    assert ranks.shape == (2, 16, 3)
    with torch.no_grad():
        hidden = backbone.model(tokens).last_hidden_state
        for s, t, k in itertools.product(range(2), range(16), range(3)):
            order = heads[k](hidden[s, t]).argsort(descending=True).tolist()
            # A rank may differ only where two logits are equal to the last bits; random weights have none.
            assert ranks[s, t, k] == min(order.index(int(tokens[s, t + 2 + k])), NUM_RANKS)


def test_answers_end_at_the_end_of_text(backbone, heads, monkeypatch):
    written = torch.randint(1, VOCAB, (4, 10 + 12))
    written[1, 10 + 6] = 0  # the 7th new token
    written[2, 3] = 0  # in the prompt: ends nothing
    monkeypatch.setattr(answers, "continue_greedily", lambda *_: written)
    args = calibrate.CalibrateOptions(model="", prompts=4, prompt_tokens=10, new_tokens=12)
    measured = calibrate.measure_continuations(args, backbone, heads, np.arange(60, dtype=np.uint16))
    assert measured.ranks_SPK.shape == (4, 9, 3)
    # Position 0 guesses new tokens 1, 2, 3 (from 0); position 2 still guesses 3, 4, 5, position 3 would guess the end.
    assert measured.valid_SP.sum(axis=1).tolist() == [9, 3, 9, 9]
    assert len(measured.flat()) == 30


def made_up_ranks(count: int = 4000) -> np.ndarray:
    """Dependent heads: all right together or each of them badly."""
    rng = np.random.default_rng(0)
    easy = rng.random((count, 1)) < 0.4
    hard = rng.integers(0, NUM_RANKS + 1, (count, 3))
    return np.where(easy, rng.integers(0, 2, (count, 3)), hard)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_joint_tree_is_the_best_tree(size):
    """Without smoothing the greedy order reaches the best expected length of all trees, found by trying them all."""
    ranks = np.minimum(made_up_ranks()[:, :2], 3)
    ranks = np.where(ranks == 3, NUM_RANKS, ranks)
    nodes = [[a] for a in range(3)] + [[a, b] for a in range(3) for b in range(3)]
    closed = (t for t in itertools.combinations(nodes, size) if all([n[0]] in t for n in t))
    best = max(calibrate.accepted_lengths(ranks, list(tree)).mean() for tree in closed)
    found = calibrate.search_joint_tree(ranks, size, prior_count=0.0)
    assert calibrate.accepted_lengths(ranks, found).mean() == best


def test_joint_tree_order(tmp_path):
    ranks = made_up_ranks()
    order = calibrate.search_joint_tree(ranks, 40)
    (tmp_path / "tree.json").write_text(json.dumps(order))
    assert load_tree(tmp_path / "tree.json", 3).paths() == order  # parents first, none twice, none added
    gains = np.diff([calibrate.accepted_lengths(ranks, order[:n]).mean() for n in range(20)])
    # Smoothing may swap neighbours whose counts differ by less than the prior's weight.
    assert (np.diff(gains) < 8 / len(ranks)).all()
    independent = search_tree(calibrate.accuracy_by_rank(ranks), 16).paths()
    assert calibrate.accepted_lengths(ranks, order[:16]).mean() > calibrate.accepted_lengths(ranks, independent).mean()


def test_tokens_per_step_walks_the_answers():
    ranks = np.array([[[0, 0], [9, 9], [9, 9], [0, 3], [1, 0], [9, 9], [0, 0]]])
    valid = np.ones((1, 7), dtype=bool)
    valid[0, 6] = False
    # Steps: position 0 accepts 2 of [0], [0, 0]; position 3 accepts 1; position 5 none; 6 is beyond the end.
    measured = Continuations(ranks, valid)
    assert calibrate.tokens_per_step(measured, [[0], [0, 0]]) == pytest.approx((3 + 2 + 1) / 3)
    assert calibrate.tokens_per_step(measured, []) == 1
    assert calibrate.accepted_lengths(ranks, [[0], [1], [1, 0]])[0].tolist() == [1, 0, 0, 1, 2, 0, 1]


def test_walked_tree_is_no_worse_where_steps_start():
    """Guesses that come in long easy runs: most positions are easy, most steps start at the hard ones between."""
    rng = np.random.default_rng(0)
    hard = np.arange(60) % 4 == 0
    ranks = np.where(hard[None, :, None], rng.integers(1, 4, (50, 60, 3)), 0)
    measured = Continuations(ranks, np.ones((50, 60), dtype=bool))
    everywhere = calibrate.search_joint_tree(measured.flat(), 4)
    walked = calibrate.search_walked_tree(measured, 4)
    assert len(walked) == 4
    assert calibrate.tokens_per_step(measured, walked) >= calibrate.tokens_per_step(measured, everywhere)
    starts = calibrate.visited(measured, walked)
    assert starts[:, 0].all()
    lengths = calibrate.accepted_lengths(ranks, walked)
    for row, accepted in zip(starts, lengths, strict=True):
        begun = np.flatnonzero(row)
        assert (np.diff(begun) == 1 + accepted[begun[:-1]]).all()
