"""The wire format: decoding inverts encoding, and invalid messages are refused before they cost anything."""

import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from euryale.client import errors, protocol, wire
from euryale.client.logprobs import Logprobs, TokenLogprob

# Deadlines measure the machine, not the code.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOT = Path(__file__).resolve().parents[2]

token = st.integers(-(2**31), 2**31 - 1)
tokens = st.lists(token, max_size=20).map(tuple)
scalar = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
mapping = st.dictionaries(st.text(max_size=8), scalar, max_size=5)
usage = st.builds(protocol.Usage, prompt_tokens=token, output_tokens=token, decode_steps=token)
stop = st.none() | st.text() | st.integers(0, 1000)
ends = st.builds(protocol.SampleEnd, finish_reason=st.text(), output_tokens=token, decode_steps=token, stop=stop)


@st.composite
def some_logprobs(draw):
    count, width = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    return Logprobs(*(draw(st.binary(min_size=n, max_size=n)) for n in (4 * count, *[4 * count * width] * 2)))


logprobs = some_logprobs()
messages = st.one_of(
    st.builds(
        protocol.Generate,
        prompt=st.none() | st.text(),
        prompt_tokens=st.none() | tokens.map(wire.pack_tokens),
        messages=st.none()
        | st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), min_size=1, max_size=3).map(tuple),
        params=mapping,
    ),
    st.builds(protocol.Cancel, target=st.binary(max_size=64)),
    st.builds(protocol.Queued, prompt_tokens=tokens, seed=st.integers(0, 2**64 - 1), fingerprint=st.text()),
    st.builds(
        protocol.Delta,
        index=token,
        tokens=tokens,
        text=st.text(),
        tokens_per_step=tokens,
        sample_index=st.integers(0, 200),
        logprobs=st.none() | logprobs,
        prompt_logprobs=st.none() | logprobs,
    ),
    st.builds(
        protocol.Done,
        finish_reason=st.text(),
        text=st.text(),
        usage=usage,
        stop=stop,
        samples=st.none() | st.lists(ends, max_size=3).map(tuple),
    ),
    st.builds(
        protocol.Error,
        code=st.text(),
        message=st.text(),
        retry_after=st.none() | st.floats(allow_nan=False),
        request_id=st.none() | st.binary(),
    ),
    st.builds(protocol.StatsReply, values=mapping),
)
ALL = protocol.REQUESTS | protocol.REPLIES


@relaxed
@given(messages)
def test_round_trip(message):
    assert wire.decode(wire.encode(message), ALL, strict=True) == message


def test_logprobs_are_a_sequence_of_tokens():
    three = Logprobs(
        struct.pack("<3f", -1, -2, -3), wire.pack_tokens(range(6)), struct.pack("<6f", *(-i / 2 for i in range(6)))
    )
    assert list(three) == [
        TokenLogprob(-1, ((0, 0), (1, -0.5))),
        TokenLogprob(-2, ((2, -1), (3, -1.5))),
        TokenLogprob(-3, ((4, -2), (5, -2.5))),
    ]
    assert three[-1] == three[2]
    assert three[:2] + three[2:] == three == Logprobs.join(three[i : i + 1] for i in range(3))
    assert list(three[1:2]) == [three[1]]
    assert len(three[3:]) == 0 == len(three[2:1])
    with pytest.raises(IndexError):
        _ = three[3]
    with pytest.raises(ValueError, match="slices with step 1"):
        _ = three[::2]
    with pytest.raises(ValueError, match="cannot be joined"):
        _ = three + Logprobs(b"1234")


@pytest.mark.parametrize(
    "parts",
    [b"1234", [b"1234", b""], [b"123", b"", b""], [b"", b"1234", b"1234"], [b"1234", b"1234", b""], [b"", b"", 5]],
)
def test_logprobs_of_different_sizes_are_refused(parts):
    delta = {"index": 0, "tokens": b"", "text": "", "tokens_per_step": [], "logprobs": parts}
    with pytest.raises(wire.WireError, match="logprobs must"):
        wire.decode(msgpack.packb({"type": "delta", "v": 2} | delta), ALL, strict=True)


def test_replies_with_one_sample_have_no_sample_fields():
    """Byte for byte: fields for several samples are left out."""
    delta = {"index": 3, "tokens": b"\1\0\0\0", "text": "x", "tokens_per_step": [1]}
    body = msgpack.packb({"type": "delta", "v": 2} | delta)
    assert wire.encode(protocol.Delta(index=3, tokens=(1,), text="x", tokens_per_step=(1,))) == body
    usage = {"prompt_tokens": 3, "output_tokens": 5, "decode_steps": 3}
    body = msgpack.packb({"type": "done", "v": 2, "finish_reason": "length", "text": "", "usage": usage})
    assert wire.encode(protocol.Done(finish_reason="length", text="", usage=protocol.Usage(**usage))) == body


def refusal(body):
    """Return the code with which a body is refused, None if it is a message; any other exception is a bug."""
    try:
        wire.decode(body, ALL, strict=True)
    except wire.WireError as error:
        return error.code
    return None


CODES = ("malformed", "unsupported_version", "unknown_verb", "invalid_request")


@relaxed
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_with_a_code(body):
    assert refusal(body) in (None, *CODES)


@given(messages, st.data())
@relaxed
def test_mutated_messages_are_read_or_refused(message, data):
    body = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(body[: data.draw(st.integers(0, len(body)))])
    assert refusal(body) in (None, *CODES)


nested = st.recursive(scalar | st.binary(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@settings(relaxed, max_examples=30)
@given(nested)
def test_the_structure_scan_agrees_with_msgpack(value):
    body = msgpack.packb(value)
    wire.check_structure(body, max_depth=100)
    for broken in (body[:-1], body + b"\0"):
        with pytest.raises(wire.WireError):
            wire.check_structure(broken, max_depth=100)


def test_depth_is_bounded():
    def deep(levels):
        return b"\x91" * levels + b"\xc0"

    wire.check_structure(deep(wire.MAX_DEPTH))
    with pytest.raises(wire.WireError, match="nested deeper"):
        wire.check_structure(deep(wire.MAX_DEPTH + 1))
    with pytest.raises(wire.WireError, match="nested deeper"):
        wire.check_structure(b"\x91" * 1_000_000 + b"\xc0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # an array that announces four billion items
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xffx",
        b"\xd4\x01\x00",  # an extension type
        b"\xa1\xff",  # invalid UTF-8
        b"\x93\x01\x02",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"type": "hello"}),
        msgpack.packb({"v": 2}),
        msgpack.packb({"type": 3, "v": 2}),
        msgpack.packb({"type": "hello", "v": "1"}),
        msgpack.packb({"type": "hello", "v": True}),
        msgpack.packb(list(range(100_000))),
    ],
)
def test_malformed(body):
    with pytest.raises(wire.WireError) as caught:
        wire.decode(body, protocol.REQUESTS, strict=True)
    assert caught.value.code == "malformed"


def test_a_hostile_body_is_refused_quickly():
    body = b"\xdd\x00\x3f\xff\xff" + b"\xc0" * (1 << 22)
    start = time.process_time()
    with pytest.raises(wire.WireError, match="more than"):
        wire.check_structure(body)
    assert time.process_time() - start < 0.5  # measured: 4 ms


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"type": "hello", "v": 1}, "unsupported_version", "version 1 is not supported, only version 2"),
        ({"type": "evaluate", "v": 2}, "unknown_verb", "use one of hello, generate"),
        ({"type": "hello", "v": 2, "name": "x"}, "invalid_request", "unknown field 'name'"),
        ({"type": "cancel", "v": 2}, "invalid_request", "target .bytes. is missing"),
        ({"type": "cancel", "v": 2, "target": "text"}, "invalid_request", "must be bytes, not 'text'"),
        ({"type": "generate", "v": 2, "prompt": 5}, "invalid_request", "prompt must be a string"),
        ({"type": "generate", "v": 2, "prompt_tokens": [1]}, "invalid_request", "little-endian int32"),
        ({"type": "generate", "v": 2, "prompt_tokens": b"abc"}, "invalid_request", "little-endian int32"),
        ({"type": "generate", "v": 2, "messages": []}, "invalid_request", "list of 1 to"),
        ({"type": "generate", "v": 2, "messages": [{"role": "user"}]}, "invalid_request", "role and content"),
        ({"type": "generate", "v": 2, "messages": [{"role": "u", "content": 1}]}, "invalid_request", "both strings"),
        ({"type": "generate", "v": 2, "params": [1]}, "invalid_request", "params must be a map"),
    ],
)
def test_schema(fields, code, text):
    with pytest.raises(wire.WireError, match=text) as caught:
        wire.decode(msgpack.packb(fields), protocol.REQUESTS, strict=True)
    assert caught.value.code == code


def test_a_client_ignores_unknown_fields():
    body = msgpack.packb({"type": "drained", "v": 2, "new": 1})
    assert wire.decode(body, protocol.REPLIES, strict=False) == protocol.Drained()


def test_tokens_are_four_little_endian_bytes():
    assert wire.pack_tokens([1, 256, -1]) == b"\x01\0\0\0\0\x01\0\0\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="32-bit"):
        wire.pack_tokens([2**31])


def test_every_code_has_its_exception():
    kinds = (errors.InvalidRequest, errors.TooLarge, errors.Draining, errors.GroupLost, errors.UnsupportedVersion)
    for kind in kinds:
        error = errors.error_from_code(kind.code, "text")
        assert type(error) is kind
        assert (error.code, str(error)) == (kind.code, "text")
    overloaded = errors.error_from_code("overloaded", "text", 2.5)
    assert isinstance(overloaded, errors.Overloaded)
    assert overloaded.retry_after == 2.5
    assert isinstance(errors.error_from_code("unknown_verb", "text"), errors.ProtocolError)
    unknown = errors.error_from_code("from_the_future", "text")
    assert type(unknown) is errors.EuryaleError
    assert unknown.code == "from_the_future"
    every = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, errors.EuryaleError) for kind in every)


def test_the_protocol_page_lists_every_message_and_field():
    page = (ROOT / "docs" / "protocol.md").read_text()
    for name, cls in ALL.items():
        assert f"`{name}`" in page
        for field in cls.schema:
            assert f"`{field}`" in page, (name, field)


IMPORT = """
import sys, time
sys.path.append(sys.argv[1])
start = time.process_time()
import euryale.client
print(time.process_time() - start, *(name for name in sys.argv[2:] if name in sys.modules))
"""


def test_the_client_imports_fast():
    heavy = ["torch", "numpy", "transformers", "asyncio", "euryale.scheduler", "euryale.runtime"]
    runs = [
        subprocess.run(
            [sys.executable, "-c", IMPORT, str(ROOT / "src"), *heavy], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert [run[1:] for run in runs] == [[], [], []]
    assert min(float(run[0]) for run in runs) < 0.15  # seconds of processor time; the best of three, for busy machines


def test_exports():
    import euryale.client as client

    for name in client.__all__:
        assert isinstance(getattr(client, name), type), name
    assert isinstance(client, types.ModuleType)
    with pytest.raises(AttributeError):
        _ = client.nothing
