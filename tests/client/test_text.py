"""Text over real sockets, with characters of several tokens and steps of every size."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_rig import RawClient, as_client, made_up, serving
from vocabularies import REPLACEMENT, SMILE, reference, smile_tokens, vocabulary

from euryale.client import Client, protocol
from euryale.frontend.detokenizer import TokenBytes
from euryale.frontend.output_stream import OpenSample
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput

TOKENIZER = vocabulary("llama-2")
SMILES = smile_tokens() * 30
STEPS = [[1], [2], [3], [4], [5], [5, 1, 4, 2, 3], [2, 4, 4, 4, 4, 4, 4, 4, 4, 4]]


def steps_of(tokens, sizes):
    """Split the tokens into steps of these sizes, repeated."""
    rest = iter(tokens)
    return list(itertools.takewhile(bool, (list(itertools.islice(rest, size)) for size in itertools.cycle(sizes))))


def smiling(sizes):
    """Return a script that repeats the four byte tokens of SMILE up to ``max_tokens``."""
    return lambda request: steps_of(SMILES[: request.params.max_tokens], sizes)


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_characters_of_several_tokens_streamed_and_whole(sizes):
    with serving(smiling(sizes), tokenizer=TOKENIZER) as rig, Client(rig.address) as client:
        rig.engine.pause = 0.001  # so that deltas are not all merged into one
        generation = client.generate("a", max_tokens=120, logprobs=1)
        tokens, text = [], ""
        for delta in generation:
            tokens += delta.tokens
            text += delta.text
            assert text == SMILE * (len(tokens) // 4)  # no text is missing
            assert delta.logprobs == as_client(made_up(list(delta.tokens), 1))
        whole = client.generate("a", max_tokens=120).result()
        assert (text, tokens) == (30 * SMILE, SMILES)
        assert whole.text == generation.result().text == TOKENIZER.decode(whole.tokens) == 30 * SMILE
        cut = client.generate("a", max_tokens=10).result()
        assert (cut.text, cut.finish_reason) == (2 * SMILE + REPLACEMENT, "length")


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_a_stop_string_of_characters_of_several_tokens(sizes):
    letters = TOKENIZER.convert_tokens_to_ids(["a", "b"])
    answer = [letters[0], *SMILES[:8], letters[1], *SMILES[:20]]
    with serving(lambda request: steps_of(answer, sizes), tokenizer=TOKENIZER) as rig, Client(rig.address) as client:
        result = client.generate("a", max_tokens=120, logprobs=1, stop=["b" + 2 * SMILE, 3 * SMILE]).result()
        assert (result.text, result.stop) == ("a" + 2 * SMILE, "b" + 2 * SMILE)
        assert result.tokens == tuple(answer[:18])
        assert result.logprobs == as_client(made_up(answer[:18], 1))


def test_the_last_message_has_the_incomplete_character():
    with serving(smiling([3]), tokenizer=TOKENIZER) as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt="a", params={"max_tokens": 7})
        replies = []
        while not replies or not isinstance(replies[-1], protocol.Done):
            replies.append(raw.receive()[1])
        assert "".join(reply.text for reply in replies[1:-1]) == SMILE
        assert replies[-1].text == REPLACEMENT


def answer_of(tokens, sizes, params):
    """Return text, tokens, log-probabilities and end of a sample with these tokens in steps of these sizes."""
    sample = OpenSample(key=1, index=0, context=[1], params=params, token_bytes=TokenBytes(TOKENIZER))
    text, taken, logprobs = "", [], []
    steps = steps_of(tokens, sizes)
    for number, step in enumerate(steps, 1):
        sample.take(RequestOutput(1, step, "length" if number == len(steps) else None, made_up(step, 1)))
        delta = sample.take_delta()
        if delta is not None:
            assert len(delta.logprobs or ()) == len(delta.tokens) == sum(delta.tokens_per_step)
            text, taken, logprobs = text + delta.text, [*taken, *delta.tokens], [*logprobs, *(delta.logprobs or ())]
        if sample.end is not None:
            break
    return text + sample.tail, taken, logprobs, sample.end.finish_reason, sample.end.stop


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([*SMILES[:4], *TOKENIZER.encode("ab th", add_special_tokens=False), 1]), min_size=1),
    st.lists(st.integers(1, 6), min_size=1),
    st.lists(st.text(alphabet="ab t😀\ufffd", min_size=1, max_size=3), max_size=3),
)
def test_an_answer_is_the_same_in_any_steps(tokens, sizes, stops):
    params = SamplingParams(max_tokens=len(tokens), stop=tuple(stops), logprobs=1)
    answer = answer_of(tokens, sizes, params)
    assert answer == answer_of(tokens, [1], params)
    text, taken, _, _, stop = answer
    whole = reference(TOKENIZER, tokens)
    assert whole.startswith(text)
    assert (stop is None) == (not any(stop in whole for stop in stops))
    if stop is None:
        assert (text, taken) == (whole, tokens)
    else:
        # An incomplete character is part of the text only at the end of the answer.
        shown = reference(TOKENIZER, taken)
        assert shown.startswith(text + stop)
