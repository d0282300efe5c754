"""What can go wrong between a client and the server, one exception per remedy.

An error travels as a code and a sentence; ``error_from_code`` turns it into the exception of that code.
"""


class EuryaleError(Exception):
    """Base of all errors of this library. ``code`` is the word that travels in an ``error`` message."""

    code = "internal"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InvalidRequest(EuryaleError, ValueError):
    """The request can never work as it is; the message says what to change."""

    code = "invalid_request"


class TooLarge(InvalidRequest):
    """The message is larger than the server takes (``ServerInfo.max_message_bytes``)."""

    code = "too_large"


class Overloaded(EuryaleError):
    """The server has as many requests as it may hold. Try again after ``retry_after`` seconds."""

    code = "overloaded"

    def __init__(self, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(EuryaleError):
    """The server is finishing its running requests and takes no new ones."""

    code = "draining"


class GroupLost(EuryaleError):
    """The ranks behind the server died or fell silent; the request is lost, another server may take it."""

    code = "group_lost"


class ProtocolError(EuryaleError):
    """A message that the protocol does not allow, sent by either side."""

    code = "malformed"


class UnsupportedVersion(ProtocolError):
    """Client and server speak different versions of the protocol."""

    code = "unsupported_version"


class Cancelled(EuryaleError):
    """The generation was cancelled before its end. ``completion`` holds what had arrived until then."""

    code = "cancelled"

    def __init__(self, message: str = "", *, completion: object = None) -> None:
        super().__init__(message)
        self.completion = completion


class TimedOut(EuryaleError, TimeoutError):
    """Nothing arrived for this request within the client's timeout."""

    code = "timed_out"


class ServerLost(EuryaleError, ConnectionError):
    """The server cannot be reached, or the connection broke while requests were in flight."""

    code = "server_lost"


_BY_CODE: dict[str, type[EuryaleError]] = {
    kind.code: kind
    for kind in (InvalidRequest, TooLarge, Draining, GroupLost, ProtocolError, UnsupportedVersion, Cancelled)
} | {
    "unknown_verb": ProtocolError,
    "duplicate_request_id": ProtocolError,
    "slow_reader": ServerLost,
}


def error_from_code(code: str, message: str, retry_after: float | None = None) -> EuryaleError:
    """The exception for an ``error`` message; an unknown code gives a plain EuryaleError that carries it."""
    if code == Overloaded.code:
        return Overloaded(message, retry_after=1.0 if retry_after is None else retry_after)
    return _BY_CODE.get(code, EuryaleError)(message, code=code) if code != Cancelled.code else Cancelled(message)
