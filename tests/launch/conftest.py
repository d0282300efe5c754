"""The model that the launch tests serve."""

import pytest
from support import family_config, head_tensors, make_model, save_heads
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with a byte tokenizer: (directory, transformers model)."""
    directory = tmp_path_factory.mktemp("served")
    made = make_model(directory, family_config("llama", vocab_size=300, max_position_embeddings=256))
    save_heads(directory / "medusa", head_tensors(made))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 3 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(directory)
    return directory, made
