"""What ``generation_config.json`` says: end-of-sequence ids and default sampling parameters."""

from pathlib import Path

from euryale.client.params import RULES
from euryale.client.rules import BOOLEAN, NULL, either, list_of, whole
from euryale.runtime.model.config import ModelConfig
from euryale.scheduler import json_file

FILE = "generation_config.json"
_REMEDY = "correct it, or remove the file to use greedy decoding"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _read(directory: str) -> dict:
    path = Path(directory) / FILE
    return json_file.read_object(path, "copy it again or remove it") if path.is_file() else {}


def end_ids(directory: str, config: ModelConfig) -> frozenset[int]:
    """The tokens that end an answer, from the generation config or else the model's."""
    content = _read(directory)
    token = whole(0, config.vocab_size - 1)
    rules = {"eos_token_id": either(NULL, token, list_of(token, 1024))}
    json_file.check(Path(directory) / FILE, content, rules, remedy=_REMEDY)
    ids = content.get("eos_token_id", config.hf.eos_token_id)
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def default_params(directory: str) -> dict:
    """Fields of SamplingParams a request gets unless it says otherwise; greedy if ``do_sample`` is not set."""
    content = _read(directory)
    path = Path(directory) / FILE
    json_file.check(path, content, {"do_sample": either(NULL, BOOLEAN)}, remedy=_REMEDY)
    if not content.get("do_sample"):
        return {}
    json_file.check(path, content, {name: either(NULL, RULES[name]) for name in _SAMPLING}, remedy=_REMEDY)
    named = {name: content[name] for name in _SAMPLING if content.get(name) is not None}
    return {"temperature": 1.0} | named
