"""What ``generation_config.json`` says: end-of-sequence ids and default sampling parameters."""

import json
from pathlib import Path

from euryale.runtime.config import ModelConfig
from euryale.scheduler.sampling_params import SamplingParams


def _read(directory: str) -> dict:
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def end_ids(directory: str, config: ModelConfig) -> frozenset[int]:
    """The tokens that end an answer, from the generation config or else the model's."""
    ids = _read(directory).get("eos_token_id", getattr(config.hf, "eos_token_id", None))
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def default_params(directory: str) -> dict:
    """Fields of SamplingParams a request gets unless it says otherwise; greedy if ``do_sample`` is not set."""
    content = _read(directory)
    if not content.get("do_sample"):
        return {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    named = {"temperature": 1.0} | {k: content[k] for k in names if k in content}
    named = {k: v for k, v in named.items() if v is not None}
    SamplingParams(**named)  # ValueError here rather than at the first request
    return named
