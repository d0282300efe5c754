"""The requests in flight: what the engine holds, which client waits for it, and which output is unsent."""

import contextlib
import time
from collections import deque
from typing import Any

import numpy as np

from euryale.client import protocol
from euryale.frontend import messages
from euryale.frontend.client_socket import ClientPort
from euryale.frontend.detokenizer import TokenBytes
from euryale.frontend.engine_link import FrontEndLink, LinkLost
from euryale.frontend.output_stream import OpenRequest, OpenSample
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput


class InFlight:
    """Every request from its acceptance to the engine's last output for it.

    ``len()`` counts the samples that the engine holds. A client gets its final message as soon as a stop string matches
    or it cancels, while the engine may hold the request for another step.
    """

    def __init__(self, port: ClientPort, link: FrontEndLink, token_bytes: TokenBytes) -> None:
        self._port = port
        self._link = link
        self._token_bytes = token_bytes
        self._held: dict[int, tuple[OpenRequest, OpenSample]] = {}  # by key
        self._awaited: dict[bytes, dict[bytes, OpenRequest]] = {}  # by client and request id
        self._unsent: dict[int, tuple[OpenRequest, OpenSample]] = {}  # samples with tokens since their last delta
        self._num_keys = 0
        self._finish_times: deque[float] = deque(maxlen=32)
        names = ("received", "rejected", "finished", "cancelled", "failed")
        self.counts = {f"requests_{name}": 0 for name in names} | {"prompt_tokens": 0, "output_tokens": 0}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def clients(self) -> set[bytes]:
        """The clients that wait for an answer."""
        return set(self._awaited)

    def find(self, client: bytes, request_id: bytes) -> OpenRequest | None:
        """Return the request of this client and id that is not finished; None if there is none."""
        return self._awaited.get(client, {}).get(request_id)

    def add(self, client: bytes, request_id: bytes, prompt: np.ndarray, params: SamplingParams) -> None:
        """Pass a request to the engine. ``prompt`` int32 [length]."""
        keys = range(self._num_keys + 1, self._num_keys + params.n + 1)
        self._num_keys += params.n
        request = OpenRequest(
            keys=keys,
            client=client,
            request_id=request_id,
            prompt=prompt,
            params=params,
            token_bytes=self._token_bytes,
        )
        self._awaited.setdefault(client, {})[request_id] = request
        self.counts["prompt_tokens"] += len(prompt)
        self._held.update((sample.key, (request, sample)) for sample in request.samples)
        self._send_engine(messages.AddRequest(keys=tuple(keys), prompt=prompt.tobytes(), params=params))

    def take(self, output: RequestOutput) -> None:
        """Record a step's output for a sample, and finish its request if it has ended."""
        if output.key not in self._held:
            return
        request, sample = self._held[output.key]
        if output.finish_reason is not None:
            del self._held[output.key]
            self._finish_times.append(time.monotonic())
        if request.closed or sample.end is not None:
            return  # ended by a stop string or a cancel that the engine had not received yet
        before = sample.num_tokens
        sample.take(output)
        self.counts["output_tokens"] += sample.num_tokens - before
        if request.has_ended:
            done = request.done()
            self._finish(request, done, "cancelled" if done.finish_reason == "cancelled" else "finished")
            return
        self._unsent[sample.key] = request, sample
        if sample.end is not None:
            self._release(sample)

    def flush(self) -> None:
        """Send the output recorded since the last call: one delta per sample, for any number of steps."""
        for request, sample in self._unsent.values():
            self._send_delta(request, sample)
        self._unsent.clear()

    def reject(self, key: int, error: protocol.Error) -> None:
        """Finish a request that the engine refused."""
        held = self._held.pop(key, None)
        if held is not None and not held[0].closed:
            self._finish(held[0], error, "failed")

    def cancel(self, request: OpenRequest) -> None:
        """Finish a request for its client now, and ask the engine to cancel it."""
        self._finish(request, request.cancel(), "cancelled")

    def cancel_all(self) -> None:
        """Cancel all requests."""
        for requests in list(self._awaited.values()):
            for request in list(requests.values()):
                self.cancel(request)

    def forget(self, client: bytes) -> None:
        """Cancel the requests of a client that is gone."""
        for request in list(self._awaited.get(client, {}).values()):
            self._close(request, "cancelled")

    def lose(self, error: protocol.Error) -> None:
        """Finish all requests with ``error``, because the engine is gone."""
        held, self._held = self._held, {}
        for request, _ in held.values():
            if not request.closed:
                self._finish(request, error, "failed")

    def retry_after(self) -> float:
        """Estimate the seconds until the next request ends, from the latest ones."""
        times = self._finish_times
        pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        return min(30.0, max(0.1, pace))

    def _send_delta(self, request: OpenRequest, sample: OpenSample) -> None:
        delta = sample.take_delta()
        if delta is not None:
            self._port.send(request.client, request.request_id, delta)

    def _finish(self, request: OpenRequest, final: Any, outcome: str) -> None:
        for sample in request.samples:
            self._send_delta(request, sample)
        self._port.send(request.client, request.request_id, final)
        self._close(request, outcome)

    def _close(self, request: OpenRequest, outcome: str) -> None:
        """Forget a request on the client's side, and cancel it in the engine if it still runs."""
        self.counts[f"requests_{outcome}"] += 1
        request.closed = True
        requests = self._awaited[request.client]
        del requests[request.request_id]
        if not requests:
            del self._awaited[request.client]
        for sample in request.samples:
            self._unsent.pop(sample.key, None)
            self._release(sample)

    def _release(self, sample: OpenSample) -> None:
        """Cancel a sample in the engine, if the engine still holds it."""
        if sample.key in self._held:
            self._send_engine(messages.CancelRequest(key=sample.key))

    def _send_engine(self, message: Any) -> None:
        with contextlib.suppress(LinkLost):  # the loop detects the loss too, and finishes all requests
            self._link.send(message)
