"""The tokenizer that lies beside a model."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging


def load_tokenizer(directory: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load the model's fast tokenizer; ValueError if there is none or it has ids of ``vocab_size`` or more."""
    logging.set_verbosity_error()
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"{directory} holds no tokenizer: copy tokenizer.json and tokenizer_config.json beside the model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's errors are of many kinds
        raise ValueError(f"cannot load the tokenizer in {directory}: {error}") from error
    # Removing blanks before punctuation would change what the model wrote, and not token by token.
    tokenizer.clean_up_tokenization_spaces = False
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has ids up to {largest} and the model a vocabulary of {vocab_size}: "
            "it belongs to another model"
        )
    return tokenizer
