"""Exceptions of the client, one for each remedy.

On the wire an error is a code and a sentence; ``error_from_code`` returns the exception of that code.
"""


class EuryaleError(Exception):
    """Base of all errors of this library. ``code`` identifies the error in an ``error`` message."""

    code = "internal"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InvalidRequest(EuryaleError, ValueError):
    """The request can never succeed as it is; the message says what to change."""

    code = "invalid_request"


class TooLarge(InvalidRequest):
    """The message is larger than the server accepts (``ServerInfo.max_message_bytes``)."""

    code = "too_large"


class Overloaded(EuryaleError):
    """The server has its maximum number of requests. Try again after ``retry_after`` seconds."""

    code = "overloaded"

    def __init__(self, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(EuryaleError):
    """The server finishes its requests and refuses new ones. Use another server."""

    code = "draining"


class GroupLost(EuryaleError):
    """The ranks behind the server died or stopped responding. The request is lost; use another server."""

    code = "group_lost"


class ProtocolError(EuryaleError):
    """Either side sent a message that violates the protocol."""

    code = "malformed"


class UnsupportedVersion(ProtocolError):
    """Client and server use different versions of the protocol."""

    code = "unsupported_version"


class Cancelled(EuryaleError):
    """The generation was cancelled before its end. ``completion`` is the part that had arrived."""

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
    """Returns the exception for an ``error`` message; for an unknown code, an EuryaleError with that code."""
    if code == Overloaded.code:
        return Overloaded(message, retry_after=1.0 if retry_after is None else retry_after)
    return _BY_CODE.get(code, EuryaleError)(message, code=code) if code != Cancelled.code else Cancelled(message)
