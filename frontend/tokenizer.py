"""Loads the tokenizer stored beside a model."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from euryale.client.rules import BOOLEAN, MAP, NULL, Rule, either, is_text, list_of, number, text
from euryale.scheduler import json_file

_FLAGS = {"lstrip", "rstrip", "normalized", "single_word", "special"}
_TOKEN = either(NULL, text(), Rule("a map that describes an AddedToken", lambda v: _is_token(v, "AddedToken")))
_ADDED = Rule("a map from token ids to maps that describe a token", lambda v: _is_added_map(v))
_SPECIAL = Rule("a token", lambda v: v is not None and _TOKEN.fits(v))
_NAMED = Rule("a map from names to tokens", lambda v: _is_named_map(v))
_TEMPLATE = Rule(
    "a template, a list of maps with name and template, or null",
    lambda v: v is None or is_text(v) or (isinstance(v, list) and all(map(_is_named_template, v))),
)
_RULES: dict[str, Rule] = {
    "model_max_length": either(NULL, number(1, 1e31, "tokens")),
    "chat_template": _TEMPLATE,
    "tokenizer_class": either(NULL, text()),
    "added_tokens_decoder": _ADDED,
    "additional_special_tokens": either(NULL, list_of(_SPECIAL, 1 << 16)),
    "extra_special_tokens": either(NULL, _NAMED, list_of(_SPECIAL, 1 << 16)),
}
_RULES |= {f"{name}_token": _TOKEN for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_RULES |= {name: either(NULL, BOOLEAN) for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces")}


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def _is_added_map(value: object) -> bool:
    if not isinstance(value, dict) or not MAP.fits(value):
        return False
    return all(map(_is_id, value)) and all(_is_token(item, None) for item in value.values())


def _is_named_map(value: object) -> bool:
    return isinstance(value, dict) and MAP.fits(value) and all(map(_SPECIAL.fits, value.values()))


def _is_token(value: object, kind: str | None) -> bool:
    """Whether this is an added token as transformers writes it. ``kind``: its ``__type``, None for no such key."""
    if not isinstance(value, dict) or not is_text(value.get("content")) or value.get("__type") != kind:
        return False
    return all(name in _FLAGS and isinstance(value[name], bool) for name in value.keys() - {"content", "__type"})


def _is_named_template(value: object) -> bool:
    return isinstance(value, dict) and is_text(value.get("name")) and is_text(value.get("template"))


def load_tokenizer(directory: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load the model's fast tokenizer.

    Raises ValueError if it is missing or damaged, or if it has token ids of ``vocab_size`` or more.
    """
    logging.set_verbosity_error()
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"{directory} holds no tokenizer: copy tokenizer.json and tokenizer_config.json beside the model"
        )
    path = Path(directory) / "tokenizer_config.json"
    if path.is_file():
        json_file.check(path, json_file.read_object(path), _RULES, remedy="correct it, or copy the file again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # the library raises many types
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load the tokenizer in {directory}: {reason}: copy the tokenizer's files again"
        ) from error
    # Removing blanks before punctuation would change the model's text, and not token by token.
    tokenizer.clean_up_tokenization_spaces = False
    if largest < 0:
        raise ValueError(f"the tokenizer in {directory} has an empty vocabulary: copy its files again")
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has ids up to {largest} and the model a vocabulary of {vocab_size}: "
            "it belongs to another model: copy the tokenizer of this one"
        )
    return tokenizer
