"""Every parameter given the wrong type or range is answered with its name, what was given and what is right: by the
client library, by the protocol, by the lines of generate.py and by its flags."""

import json

import pytest

from euryale.client import AsyncClient, Client, InvalidRequest
from euryale.client.params import PROMPT_RULES, RULES
from euryale.client.session import build_generate
from euryale.frontend.validation import RequestError, RequestLimits, read_params
from euryale.runtime import offline
from euryale.scheduler.sampling_params import SamplingParams

LIMITS = RequestLimits(max_tokens=1000, vocab_size=500, defaults={})
NUMBERS = ["5", [5], {"a": 5}, float("nan"), float("inf"), -3, 10**18 * 10**18, 10**5000, True, object()]
BOOLEANS = [0, 1, "true", 0.0, [True]]
WRONG = {name: list(NUMBERS) for name in RULES}
WRONG |= dict.fromkeys(("ignore_eos", "speculation"), BOOLEANS)
WRONG["max_tokens"] = [*NUMBERS, 0, 2.5, 2**31]
WRONG["temperature"] = [*NUMBERS, 1e-9, 100.5]
WRONG["top_p"] = [*NUMBERS, 0, 0.0, 1e-50, 1.01]
WRONG["seed"] = [*NUMBERS, 2**64, 0.5]
WRONG["n"] = [*NUMBERS, 0, 129]
WRONG["logprobs"] = WRONG["prompt_logprobs"] = [*NUMBERS, 21]
WRONG["stop"] = [5, "", [""], [5], ["x" * 257], ["x"] * 17, {"a": 1}, "\ud800", object()]
WRONG["stop_token_ids"] = [5, "5", ["5"], [-1], [1.5], [2**40], [True], [5] * 257, {"a": 1}, object()]
WRONG["logit_bias"] = [5, "5", [5], {"a": 1}, {5: "x"}, {5: 101}, {-1: 1}, {5: float("nan")}, object()]
WRONG["acceptance"] = ["", "maybe", 5, ["exact"], True, "x" * 10_000, object()]
WRONG["cache_salt"] = ["x" * 257, 5, ["x"], "\ud800", object()]
for of_fractions in ("presence_penalty", "frequency_penalty", "priority"):
    WRONG[of_fractions] = [value for value in NUMBERS if value != -3] + [-(2**31) - 0.5, 2**31]
CASES = [(name, value) for name in sorted(RULES) for value in WRONG[name]]
WRONG_PROMPTS = [
    *(("prompt", value) for value in (5, ["a"], b"a", "\ud800", True)),
    *(("prompt_tokens", value) for value in (5, "hi", ["a"], [1.5], [2**40], [True], [None], {"a": 1})),
    *(("messages", value) for value in ("hi", 5, [], ["a"], [{"role": "user"}], [{"role": "u", "content": 1}])),
    ("messages", [{"role": "user", "content": "x", "name": "y"}]),
    ("messages", [{"role": "user", "content": "x"}] * 1025),
]


def check(text: str, name: str, says: str) -> None:
    assert text.startswith(f"{name} must be {says}, not "), text
    assert "\n" not in text
    assert len(text) < 400


def test_the_table_is_complete():
    assert set(WRONG) == set(RULES)
    assert {name for name, _ in WRONG_PROMPTS} == set(PROMPT_RULES)


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda part: str(part)[:20] if isinstance(part, str) else "")
def test_sampling_parameters(name, value):
    with pytest.raises(InvalidRequest) as caught:
        build_generate("hi", None, None, {name: value})
    check(str(caught.value), name, RULES[name].says)
    if name == "logit_bias":  # its keys are strings there, and it becomes pairs here
        return
    with pytest.raises(RequestError) as refused:
        read_params({name: value}, 10, LIMITS)
    assert refused.value.reply.code == "invalid_request"
    check(refused.value.reply.message, name, RULES[name].says)
    with pytest.raises(ValueError, match=name) as of_ours:
        SamplingParams(**{name: value})
    check(str(of_ours.value), name, RULES[name].says)


@pytest.mark.parametrize(("name", "value"), WRONG_PROMPTS)
def test_prompts(name, value):
    given = {"prompt": None, "prompt_tokens": None, "messages": None} | {name: value}
    with pytest.raises(InvalidRequest) as caught:
        build_generate(**given, params={})
    check(str(caught.value), name, PROMPT_RULES[name].says)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("timeout", "connect_timeout") for value in (None, "5", -1, float("nan"), 1e300)),
        *(("address", value) for value in (None, 5, "", "localhost:5", "tcp://a\0b:5")),
        *(("max_message_bytes", value) for value in (None, 0, -1, "5", 1.5)),
    ],
)
def test_arguments_of_clients(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, not "):
        kind(**{name: value})


def test_arguments_of_calls():
    with Client("tcp://127.0.0.1:1", connect_timeout=0.1) as client:
        for call in (client.hello, client.health, client.drain):
            with pytest.raises(ValueError, match=r"timeout must be a number of seconds from 0 to .*, not 'x'"):
                call(timeout="x")
        with pytest.raises(ValueError, match=r"generation must be what generate.. returned, not 5"):
            client.cancel(5)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        *((json.dumps({name: value}), f"{name} must be {PROMPT_RULES[name].says}, not ")
          for name, value in WRONG_PROMPTS if name != "messages" and not isinstance(value, bytes)),
        *((json.dumps({"prompt": "a", "max_tokens": value}), f"max_tokens must be {RULES['max_tokens'].says}, not ")
          for value in (0, -1, "5", 2.5, None, True, [5], 2**31, 10**30, float("nan"))),
        ('{"prompt": "a", "max_token": 5}', "unknown field 'max_token': a line has id, prompt or prompt_tokens"),
        ('{"prompt": "a", "prompt_tokens": [5]}', "give exactly one of prompt and prompt_tokens"),
        ("[" * 1000, "line 1 is not JSON that can be read: it is nested deeper than 32 levels"),
        ("5", "line 1 must be an object with a prompt, not 5"),
        ('{"prompt": 1' + "0" * 5000 + "}", "line 1 is not JSON that can be read"),
    ],
    ids=lambda part: part[:40],
)  # fmt: skip
def test_lines_of_generate(tmp_path, line, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    (job,) = offline.read_jobs(path, None, SamplingParams())
    assert text in job.error
    assert len(job.error) < 400
