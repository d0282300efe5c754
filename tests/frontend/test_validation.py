"""Output streams and default parameters, without sockets. The client's tests cover refused requests over sockets."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from euryale.client.protocol import Usage
from euryale.frontend.detokenizer import TokenBytes
from euryale.frontend.output_stream import OpenRequest
from euryale.frontend.validation import RequestLimits, read_params
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput

TEXT = "abcabdabcd"


class Letters:
    """One token per letter."""

    def __len__(self) -> int:
        return 128

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in token_ids)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return chr(ids)


def opened(keys=(1,), **params) -> OpenRequest:
    params = SamplingParams(n=len(keys), **params)
    prompt, token_bytes = np.array([97], dtype=np.int32), TokenBytes(Letters())
    return OpenRequest(keys=keys, client=b"c", request_id=b"r", prompt=prompt, params=params, token_bytes=token_bytes)


def run(steps, finish_reason, **params):
    """The concatenated deltas and the final message of a request that the engine answers with these steps."""
    request = opened(**params)
    (sample,) = request.samples
    tokens, text, accepted, done = [], "", [], None
    for number, step in enumerate(steps):
        sample.take(RequestOutput(1, step, finish_reason if number == len(steps) - 1 else None))
        delta = sample.take_delta()
        if delta is not None:
            assert delta.index == len(tokens)
            tokens += delta.tokens
            text += delta.text
            accepted += delta.tokens_per_step
        if request.has_ended:
            done = request.done()
            break
    assert sample.take_delta() is None
    return tokens, text + (done.text if done else ""), accepted, done


@settings(deadline=None)  # deadlines measure the machine, not the code
@given(st.lists(st.integers(1, 4), min_size=10, max_size=10), st.sampled_from(["", "cab", "bd", "abcd", "d", "x"]))
def test_the_answer_does_not_depend_on_the_steps(sizes, stop):
    steps, rest = [], [ord(letter) for letter in TEXT]
    for size in sizes:
        if rest:
            steps.append(rest[:size])
            rest = rest[size:]
    tokens, text, accepted, done = run(steps, "length", stop=(stop,) if stop else ())
    end = TEXT.find(stop) if stop and stop in TEXT else len(TEXT)
    last = end + len(stop) if end < len(TEXT) else end
    assert text == TEXT[:end]
    assert "".join(map(chr, tokens)) == TEXT[:last]
    assert sum(accepted) == len(tokens)
    assert done.usage == Usage(prompt_tokens=1, output_tokens=len(tokens), decode_steps=len(accepted))
    assert (done.finish_reason, done.stop) == (("stop", stop) if end < len(TEXT) else ("length", None))


def test_the_token_that_ended_it():
    *_, done = run([[97], [98, 99]], "stop", stop_token_ids=(99,))
    assert (done.finish_reason, done.stop) == ("stop", 99)


def test_an_end_without_tokens():
    tokens, text, accepted, done = run([[97], []], "cancelled")
    assert (tokens, text, accepted) == ([97], "a", [1])
    assert (done.finish_reason, done.stop) == ("cancelled", None)


def test_several_steps_make_one_delta():
    (sample,) = opened().samples
    sample.take(RequestOutput(1, [97, 98], None))
    sample.take(RequestOutput(1, [99], None))
    assert sample.end is None
    delta = sample.take_delta()
    assert (delta.index, delta.tokens, delta.text, delta.tokens_per_step) == (0, (97, 98, 99), "abc", (2, 1))


def limits(**defaults):
    return RequestLimits(max_tokens=100, vocab_size=50, defaults=defaults)


def test_defaults():
    params = read_params({}, 10, limits())
    assert params.max_tokens == 90  # 128 unless there is less room
    assert read_params({}, 10, limits(max_tokens=20)).max_tokens == 20
    assert read_params({"max_tokens": None}, 95, limits(max_tokens=20)).max_tokens == 5
    assert read_params({"temperature": 0.5}, 10, limits(temperature=0.7, top_p=0.9)).temperature == 0.5
    assert read_params({}, 10, limits(temperature=0.7, stop_token_ids=[3])).stop_token_ids == (3,)
    assert read_params({"stop": "end"}, 10, limits()).stop == ("end",)
    assert read_params({}, 10, limits(seed=3)).seed != read_params({}, 10, limits(seed=3)).seed
    assert read_params({"seed": 5}, 10, limits()).seed == 5
