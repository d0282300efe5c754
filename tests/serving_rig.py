"""A front end over real sockets with a scripted engine behind it, for the tests of this folder.

Run as a script it is a whole server in a process of its own, to be killed.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # for a checkout that is not installed

import msgpack
import numpy as np
import zmq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from euryale.client import protocol, wire
from euryale.client.logprobs import Logprobs
from euryale.frontend import messages
from euryale.frontend.config import FrontEndConfig
from euryale.frontend.engine_link import EngineLink, FrontEndLink
from euryale.frontend.frontend import FrontEnd
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput, TokenLogprobs

TEXTS = ["the quick brown fox jumps over the lazy dog", "hello world"]
EOS = 1
MAX_MODEL_LEN = 200


class ByteTokenizer:
    """A byte-level BPE behind the names that the front end uses."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        )
        self._tokenizer.train_from_iterator(TEXTS, trainer)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.chat_template: str | None = "role: content"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids  # without the GIL

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def __len__(self) -> int:
        return self.vocab_size

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return self._tokenizer.id_to_token(ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        if messages[-1]["role"] != "user":
            raise RuntimeError("the last role must be user")
        return "".join(f"{item['role']}: {item['content']}\n" for item in messages) + "assistant:"


TOKENIZER = ByteTokenizer()
INFO = {
    "model": "scripted",
    "fingerprint": "f00d",
    "max_model_len": MAX_MODEL_LEN,
    "vocab_size": TOKENIZER.vocab_size,
    "world_size": 2,
    "num_medusa_heads": 4,
    "defaults": {"temperature": 0.0, "max_tokens": 12, "stop_token_ids": []},
}
Script = list[list[int]]


@dataclass(frozen=True)
class Asked:
    """One sample of a request, as the engine sees it."""

    key: int
    prompt: tuple[int, ...]
    params: SamplingParams
    sample_index: int


def echo(request: Asked) -> Script:
    """Answers with the prompt over and over, three tokens a step."""
    answer = [request.prompt[i % len(request.prompt)] for i in range(request.params.max_tokens)]
    return [answer[i : i + 3] for i in range(0, len(answer), 3)]


def saying(text: str, size: int = 1) -> Callable[[Asked], Script]:
    """Answers with this text, ``size`` tokens a step, and the end-of-sequence token."""
    tokens = [*TOKENIZER.encode(text), EOS]
    return lambda request: [tokens[i : i + size] for i in range(0, len(tokens), size)]


def made_up(tokens: list[int], count: int | None) -> TokenLogprobs | None:
    """Log-probabilities of tokens, -t each, with themselves and the next ones as the ``count`` likeliest."""
    if count is None:
        return None
    ids = np.asarray(tokens, dtype=np.int32)
    top = ids[:, None] + np.arange(count, dtype=np.int32)
    return TokenLogprobs(-ids.astype(np.float32), top, -top.astype(np.float32) / 2)


def as_client(logprobs: TokenLogprobs) -> Logprobs:
    """Log-probabilities as the client library gives them."""
    return Logprobs(*messages.pack_logprobs(logprobs))


@dataclass
class ScriptedEngine:
    """Plays the engine on its end of the link: one step per request in turn, as ``script`` says."""

    link: EngineLink
    script: Callable[[Asked], Script] = echo
    adds: list[Asked] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    running: dict[int, deque[list[int]]] = field(default_factory=dict)
    answered: frozenset[int] = frozenset()
    may_step: threading.Event = field(default_factory=threading.Event)
    outbox: deque[Any] = field(default_factory=deque)
    endpoint: str = ""
    silent: bool = False
    dies: bool = False
    pause: float = 0.0

    def run(self) -> None:
        stop = False
        last_stats = 0.0
        while not stop and not self.dies and not self.link.lost:
            for message in self.link.receive(2):
                stop = self._take(message)
            while self.outbox:
                self.link.send(self.outbox.popleft())
            if time.monotonic() - last_stats > 0.2 and self.endpoint and not self.silent and not self.link.lost:
                last_stats = time.monotonic()
                self.link.send(messages.Stats(values={"steps": 1}))
            if self.may_step.is_set():
                self._step()
        self.link.close(0 if self.dies else 1000)

    def _take(self, message: Any) -> bool:
        match message:
            case messages.Attach():
                self.endpoint = message.endpoint
                self.link.send(messages.Welcome(info=INFO))
            case messages.AddRequest():
                prompt = wire.unpack_tokens(message.prompt)
                for key, index, params in message.samples():
                    asked = Asked(key, prompt, params, index)
                    self.adds.append(asked)
                    self.running[key] = deque(self.script(asked))
            case messages.CancelRequest():
                self.cancels.append(message.key)
                if self.running.pop(message.key, None) is not None:
                    self.link.send(messages.StepOutput(outputs=[RequestOutput(message.key, [], "cancelled")]))
            case messages.Drain():
                assert not self.running
                self.link.send(messages.Drained())
                return True
        return False

    def _logprobs(self, key: int, tokens: list[int]) -> tuple[TokenLogprobs | None, TokenLogprobs | None]:
        asked = next(add for add in self.adds if add.key == key)
        is_first, self.answered = key not in self.answered, self.answered | {key}
        prompt = made_up(asked.prompt[1:], asked.params.prompt_logprobs) if is_first else None
        return made_up(tokens, asked.params.logprobs), prompt

    def _step(self) -> None:
        outputs = []
        for key, steps in list(self.running.items()):
            tokens = steps.popleft()
            finish = None if steps else "stop" if tokens[-1] == EOS else "length"
            outputs.append(RequestOutput(key, tokens, finish, *self._logprobs(key, tokens)))
            if finish:
                del self.running[key]
        if outputs:
            self.link.send(messages.StepOutput(outputs=outputs))
            time.sleep(self.pause)


@dataclass
class Rig:
    """A running server."""

    address: str
    engine: ScriptedEngine
    frontend: FrontEnd
    threads: list[threading.Thread]
    outcome: list[str]


@contextlib.contextmanager
def serving(
    script: Callable[[Asked], Script] = echo,
    *,
    hold: bool = False,
    tokenizer: Any = TOKENIZER,
    **config: Any,
) -> Iterator[Rig]:
    """A front end and a scripted engine, each in a thread; ``hold`` lets no step run until ``may_step`` is set."""
    config = {"bind": "tcp://127.0.0.1:0", "drain_timeout": 2.0} | config
    engine_link = EngineLink()
    frontend = FrontEnd(tokenizer, FrontEndLink(engine_link.endpoint), FrontEndConfig(**config))
    scripted = ScriptedEngine(engine_link, script)
    if not hold:
        scripted.may_step.set()
    outcome: list[str] = []
    threads = [
        threading.Thread(target=scripted.run, name="scripted-engine"),
        threading.Thread(target=lambda: outcome.append(frontend.run()), name="front-end"),
    ]
    for thread in threads:
        thread.start()
    try:
        yield Rig(frontend.endpoint, scripted, frontend, threads, outcome)
    finally:
        scripted.may_step.set()
        scripted.outbox.append(messages.BeginDrain())
        for thread in threads:
            thread.join(15)
        assert not any(thread.is_alive() for thread in threads)
        assert outcome, "the front end's loop ended with an exception"


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Polls until ``condition()`` is true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
    return value


def front_end(link: EngineLink, **config: Any) -> FrontEnd:
    """A front end that does not run yet."""
    config = {"bind": "tcp://127.0.0.1:0"} | config
    return FrontEnd(TOKENIZER, FrontEndLink(link.endpoint), FrontEndConfig(**config))


class RawClient:
    """A DEALER socket that can send malformed messages."""

    def __init__(self, address: str, **options: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(address)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close(0)
        self.context.term()

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(list(frames))

    def request(self, request_id: bytes, **fields: Any) -> None:
        self.send(request_id, msgpack.packb({"v": 2} | fields))

    def receive(self, seconds: float = 10.0) -> tuple[bytes, Any]:
        """Return the next reply that is not Alive."""
        while True:
            assert self.socket.poll(int(1000 * seconds)), "no reply"
            request_id, body = self.socket.recv_multipart()
            reply = wire.decode(body, protocol.REPLIES, strict=True)
            if not isinstance(reply, protocol.Alive):
                return request_id, reply

    def receive_final(self, request_id: bytes) -> Any:
        """The next final reply to this request."""
        while True:
            got, reply = self.receive()
            if got == request_id and not isinstance(reply, protocol.STREAMED):
                return reply


def main() -> None:
    """A server that answers slowly; prints its address."""
    with serving(**({"bind": sys.argv[1]} if len(sys.argv) > 1 else {})) as rig:
        rig.engine.pause = 0.05
        print(rig.address, flush=True)
        for thread in rig.threads:
            thread.join()


if __name__ == "__main__":
    main()
