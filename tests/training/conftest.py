"""A tiny backbone with its own tokenizer, and training data."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from euryale.training import corpus

VOCAB, HIDDEN = 384, 32


@pytest.fixture(scope="session")
def few_sources():
    """Some standard library files of medium size."""
    files = [p for p in corpus.standard_library_files() if 4000 < p.stat().st_size < 8000]
    return files[:: max(1, len(files) // 24)][:24]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, few_sources):
    """A random Llama in bfloat16 whose weights are large enough that its greedy answers vary."""
    directory = tmp_path_factory.mktemp("backbone")
    corpus.train_tokenizer(few_sources, VOCAB, 256).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, few_sources):
    """JSONL with one ``text`` per source file."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": corpus.read(p)}) + "\n" for p in few_sources))
    return str(path)
