"""The text of a served model that repeats the byte tokens of one character, several of them per step."""

import json

import pytest
import torch
from safetensors.torch import save_file
from serving import served
from support import ROOT, family_config, make_model, run_script, save_heads
from vocabularies import REPLACEMENT, SMILE, smile_tokens, vocabulary

from euryale.client import Client

SMILES = smile_tokens() * 30
PROMPT = "a th"
# For each head, after which of the four tokens it is right; so steps take one to four tokens.
RIGHT = ({0, 1, 3}, {0, 3}, {0})


def followers(hidden: int, vocab: int, distance: int, right: set[int]) -> torch.Tensor:
    """An lm_head [vocab, hidden] that predicts the token ``distance`` after the one read if that is in ``right``, else
    the prompt's first token.
    """
    weight = torch.zeros(vocab, hidden)
    for place in range(4):
        wanted = SMILES[(place + distance) % 4] if place in right else vocabulary("llama-2").encode(PROMPT)[0]
        weight[wanted, place] = 1.0
    return weight


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama whose layers add nothing: each token's embedding encodes its place, and lm_head the token after it."""
    directory = tmp_path_factory.mktemp("smiling")
    tokenizer = vocabulary("llama-2")
    config = family_config("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    made = make_model(directory, config)
    weights = made.state_dict()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
    embedding = weights["model.embed_tokens.weight"].zero_()
    embedding[:, 3] = 1.0  # after any other token the first byte follows
    for place, token in enumerate(SMILES[:4]):
        embedding[token] = torch.eye(config.hidden_size)[place]
    weights["lm_head.weight"].copy_(followers(config.hidden_size, config.vocab_size, 1, {0, 1, 2, 3}))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    heads = {}
    for head, right in enumerate(RIGHT):
        heads[f"{head}.0.linear.weight"] = torch.zeros(config.hidden_size, config.hidden_size)
        heads[f"{head}.0.linear.bias"] = torch.zeros(config.hidden_size)
        heads[f"{head}.1.weight"] = followers(config.hidden_size, config.vocab_size, 2 + head, right)
    save_heads(directory / "medusa", heads)
    tokenizer.save_pretrained(directory)
    return directory, made


def test_a_group_streams_whole_characters(model):
    with served(model, 1) as (_, address), Client(address) as client:
        for speculation in (True, False):
            asked = {"speculation": speculation, "temperature": 0, "ignore_eos": True}
            generation = client.generate(PROMPT, max_tokens=120, **asked)
            tokens, text = [], ""
            for delta in generation:
                tokens += delta.tokens
                text += delta.text
                assert text == SMILE * (len(tokens) // 4)
            result = generation.result()
            assert (tokens, text) == (SMILES, 30 * SMILE)
            assert result.text == vocabulary("llama-2").decode(result.tokens) == 30 * SMILE
            assert (max(result.tokens_per_step) > 1) == speculation
            cut = client.generate(PROMPT, max_tokens=10, **asked).result()
            assert (list(cut.tokens), cut.text) == (SMILES[:10], 2 * SMILE + REPLACEMENT)
            stopped = client.generate(PROMPT, max_tokens=120, stop=3 * SMILE, **asked).result()
            assert (list(stopped.tokens), stopped.text, stopped.stop) == (SMILES[:12], "", 3 * SMILE)


@pytest.mark.parametrize("tree", ["off", "static", "dynamic"])
def test_offline_text_has_whole_characters(model, tmp_path, tree):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(json.dumps({"prompt": PROMPT, "max_tokens": count}) for count in (120, 10, 8)))
    command = ["--model", str(model[0]), "--medusa", str(model[0] / "medusa"), "--dtype", "float32", "--ignore-eos"]
    command += ["--temperature", "0", "--tree", tree, "--prompts", str(asked), "--out", str(answered)]
    done = run_script(ROOT / "launch" / "generate.py", *command)
    assert done.returncode == 0, done.stderr
    whole, cut, even = (json.loads(line) for line in answered.read_text().splitlines())
    assert (whole["tokens"], whole["text"]) == (SMILES, 30 * SMILE)
    assert (cut["tokens"], cut["text"]) == (SMILES[:10], 2 * SMILE + REPLACEMENT)
    assert even["text"] == 2 * SMILE
    sizes = set(whole["tokens_per_step"])
    assert sizes == {1} if tree == "off" else len(sizes) > 1
