"""Reads ``generation_config.json``: end-of-sequence ids and default sampling parameters."""

from pathlib import Path
from typing import Any

from euryale.client.params import RULES
from euryale.client.rules import BOOLEAN, NULL, either, list_of, whole
from euryale.runtime.model.config import ModelConfig
from euryale.scheduler import json_file

FILE = "generation_config.json"
_REMEDY = "correct it, or remove the file to use greedy decoding"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _read(directory: str) -> dict[str, Any]:
    path = Path(directory) / FILE
    return json_file.read_object(path, "copy it again or remove it") if path.is_file() else {}


def end_ids(directory: str, config: ModelConfig) -> frozenset[int]:
    """Return the ids of tokens that end an answer, by the generation config or else by the model's.

    Raises ValueError, naming the file, for ids outside the vocabulary.
    """
    content = _read(directory)
    token = whole(0, config.vocab_size - 1)
    rules = {"eos_token_id": either(NULL, token, list_of(token, 1024))}
    json_file.check(Path(directory) / FILE, content, rules, remedy=_REMEDY)
    ids = content.get("eos_token_id", config.hf.eos_token_id)
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def default_params(directory: str) -> dict[str, Any]:
    """Return the default fields of SamplingParams: none, which means greedy, unless ``do_sample`` is true.

    Raises ValueError, naming file and field, for a value that no request may have.
    """
    content = _read(directory)
    path = Path(directory) / FILE
    json_file.check(path, content, {"do_sample": either(NULL, BOOLEAN)}, remedy=_REMEDY)
    if not content.get("do_sample"):
        return {}
    json_file.check(path, content, {name: either(NULL, RULES[name]) for name in _SAMPLING}, remedy=_REMEDY)
    given = {name: content[name] for name in _SAMPLING if content.get(name) is not None}
    return {"temperature": 1.0} | given
