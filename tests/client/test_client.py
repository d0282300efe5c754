"""The synchronous client against a front end with a scripted engine."""

import gc
import itertools
import threading

import pytest
from serving_rig import EOS, TOKENIZER, saying, serving, wait_until

from euryale import client as euryale
from euryale.client import Client

LONG = {"max_tokens": 150}


@pytest.fixture(scope="module")
def rig():
    with serving() as rig:
        yield rig


@pytest.fixture
def client(rig):
    with Client(rig.address, timeout=10) as client:
        yield client


def test_hello(client):
    info = client.hello()
    assert (info.model, info.fingerprint, info.max_model_len) == ("scripted", "f00d", 200)
    assert (info.tensor_parallel_size, info.num_medusa_heads, info.chat) == (2, 4, True)
    assert info.defaults["max_tokens"] == 12


def test_streaming(client):
    prompt = TOKENIZER.encode("hello world")
    generation = client.generate("hello world", max_tokens=10)
    deltas = list(generation)
    tokens = (prompt * 2)[:10]
    assert [delta.index for delta in deltas] == [sum(len(d.tokens) for d in deltas[:i]) for i in range(len(deltas))]
    assert [token for delta in deltas for token in delta.tokens] == tokens
    assert [step for delta in deltas for step in delta.tokens_per_step] == [3, 3, 3, 1]
    completion = generation.result()
    assert completion.text == "".join(delta.text for delta in deltas) == TOKENIZER.decode(tokens)
    assert completion.tokens == tuple(tokens)
    assert completion.finish_reason == "length"
    assert completion.stop is None
    assert completion.tokens_per_step == (3, 3, 3, 1)
    assert completion.usage == euryale.Usage(prompt_tokens=len(prompt), output_tokens=10, decode_steps=4)
    assert completion.prompt_tokens == tuple(prompt)
    assert completion.fingerprint == "f00d"


def test_three_kinds_of_prompt(client):
    assert client.generate("hello").result().prompt_tokens == tuple(TOKENIZER.encode("hello"))
    assert client.generate(prompt_tokens=range(5, 9)).result().prompt_tokens == (5, 6, 7, 8)
    chat = [{"role": "user", "content": "hello"}]
    expected = TOKENIZER.encode("user: hello\nassistant:")
    assert client.generate(messages=chat).result().prompt_tokens == tuple(expected)


def test_a_seed_is_given_or_drawn(client):
    assert client.generate("hello", seed=2**64 - 1).result().seed == 2**64 - 1
    seeds = {client.generate("hello").result().seed for _ in range(5)}
    assert len(seeds) == 5


def test_interleaving(client):
    one, two = client.generate("hello", **LONG), client.generate("world", **LONG)
    pieces = [[], []]
    for deltas in itertools.zip_longest(one, two):  # zip would leave the longer one, and so cancel it
        for texts, delta in zip(pieces, deltas, strict=True):
            texts.append(delta.text if delta else "")
        assert client.health().status == "ok"  # a call in between affects neither
    for word, generation, texts in zip(("hello", "world"), (one, two), pieces, strict=True):
        assert generation.text() == "".join(texts) == (word * 75)[: len(generation.text())]
        assert len(generation.result().tokens) == 150


def test_many_at_once(client):
    generations = [client.generate("hello world", max_tokens=n) for n in range(1, 60)]
    for n, generation in reversed(list(enumerate(generations, 1))):
        assert len(generation.result().tokens) == n


def leave_by_break(client):
    for _ in client.generate("hello", **LONG):
        break


def leave_by_break_keeping_a_reference(client, references=[]):  # noqa: B006
    references.append(client.generate("hello", **LONG))
    for _ in references[-1]:
        break
    with pytest.raises(euryale.Cancelled):
        references[-1].result()


def leave_by_exception(client):
    def fail():
        for delta in client.generate("hello", **LONG):
            raise KeyError(delta)

    with pytest.raises(KeyError):
        fail()


def leave_by_close(client):
    client.generate("hello", **LONG).close()


def leave_by_context(client):
    with client.generate("hello", **LONG):
        pass


def leave_by_forgetting(client):
    client.generate("hello", **LONG)
    gc.collect()


def leave_in_another_thread(client):
    held = [client.generate("hello", **LONG)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    client.health()  # the client's own thread sends the cancellation


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_break_keeping_a_reference,
        leave_by_exception,
        leave_by_close,
        leave_by_context,
        leave_by_forgetting,
        leave_in_another_thread,
    ],
)
def test_leaving_cancels(leave):
    with serving(hold=False) as rig, Client(rig.address, timeout=10) as client:
        rig.engine.pause = 0.02
        leave(client)
        wait_until(lambda: rig.engine.cancels == [1])
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)
        assert client.stats()["requests_cancelled"] == 1
        assert not client._session.in_flight


def test_cancel():
    with serving() as rig, Client(rig.address, timeout=10) as client:
        rig.engine.pause = 0.02
        generation, other = client.generate("hello", **LONG), client.generate("world", max_tokens=30)
        read = next(iter_of(generation))
        assert client.cancel(generation) is True
        assert client.cancel(generation) is False
        with pytest.raises(euryale.Cancelled) as caught:
            generation.result()
        completion = caught.value.completion
        assert completion.finish_reason == "cancelled"
        assert completion.tokens[: len(read.tokens)] == read.tokens
        assert 0 < len(completion.tokens) < 150
        assert completion.usage.output_tokens == len(completion.tokens)
        assert len(other.result().tokens) == 30
        assert rig.engine.cancels == [1]


def iter_of(generation, references=[]):  # noqa: B006
    references.append(iter(generation))  # a dropped iterator would cancel
    return references[-1]


def test_stop_strings_and_tokens():
    with serving(saying("one two three four", size=4)) as rig, Client(rig.address, timeout=10) as client:
        for stop in ("wo th", ["xyz", "wo th"]):
            completion = client.generate("hello", stop=stop).result()
            assert (completion.text, completion.finish_reason, completion.stop) == ("one t", "stop", "wo th")
            # The tokens end with the one that completed the string, even if the step emitted more.
            assert "wo th" in TOKENIZER.decode(completion.tokens)
            assert "wo th" not in TOKENIZER.decode(completion.tokens[:-1])
            assert sum(completion.tokens_per_step) == len(completion.tokens) == completion.usage.output_tokens
        completion = client.generate("hello", stop="five").result()
        assert (completion.text, completion.finish_reason, completion.stop) == ("one two three four", "stop", EOS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "exactly one of"),
        ({"prompt": "a", "prompt_tokens": [1]}, "exactly one of"),
        ({"prompt": 5}, "prompt must be a string of Unicode text, not 5"),
        ({"prompt": "\ud800"}, "prompt must be a string of Unicode text, not"),
        (
            {"prompt": "a", "temperature": object()},
            "temperature must be 0 .* or a number from 0.001 to 100, not <",
        ),
        ({"prompt": "a", "seed": 2**64}, f"seed must be a whole number from 0 to {2**64 - 1}, not {2**64}"),
        ({"prompt": "a", "seed": 10**5000}, "seed must be .* not a value of type int"),
        ({"prompt": "a", "temperatur": 1.0}, "unknown sampling parameter 'temperatur': use one of acceptance"),
        ({"prompt_tokens": [2**40]}, "prompt_tokens must be a list of token ids, whole numbers of 32 bits"),
        ({"prompt_tokens": "hi"}, "prompt_tokens must be a list of token ids"),
        (
            {"messages": "hi"},
            "messages must be a list of 1 to 1024 items, .*role and content.*, not 'hi'",
        ),
        ({"messages": []}, "messages must be a list of 1 to 1024 items"),
        ({"prompt_tokens": ["a"]}, "prompt_tokens"),
        ({"messages": ["a"]}, "messages"),
    ],
)
def test_invalid_requests_are_refused_before_sending(client, arguments, text):
    with pytest.raises(euryale.InvalidRequest, match=text):
        client.generate(**arguments)
    assert client.health().status == "ok"


def test_invalid_requests_are_refused_by_the_server(client):
    generation = client.generate(prompt_tokens=[100_000])
    with pytest.raises(euryale.InvalidRequest, match="token id 100000; this model's ids are"):
        generation.result()
    with pytest.raises(ValueError, match="100000"):  # the error is raised again, and is a ValueError too
        generation.result()
