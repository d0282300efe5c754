"""The ZeroMQ client library and the wire protocol. Importable without torch or numpy."""

from typing import TYPE_CHECKING, Any

from euryale.client.answer import Completion, Sample
from euryale.client.errors import (
    Cancelled,
    Draining,
    EuryaleError,
    GroupLost,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    ServerLost,
    TimedOut,
    TooLarge,
    UnsupportedVersion,
)
from euryale.client.logprobs import Logprobs, TokenLogprob
from euryale.client.params import GenerateParams
from euryale.client.protocol import Delta, HealthReply, SampleEnd, ServerInfo, Usage
from euryale.client.sync import Client, Generation

if TYPE_CHECKING:
    from euryale.client.asynchronous import AsyncClient, AsyncGeneration

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Cancelled",
    "Client",
    "Completion",
    "Delta",
    "Draining",
    "EuryaleError",
    "GenerateParams",
    "Generation",
    "GroupLost",
    "HealthReply",
    "InvalidRequest",
    "Logprobs",
    "Overloaded",
    "ProtocolError",
    "Sample",
    "SampleEnd",
    "ServerInfo",
    "ServerLost",
    "TimedOut",
    "TokenLogprob",
    "TooLarge",
    "UnsupportedVersion",
    "Usage",
]


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than everything else here, so it is imported on first use.
    if name in ("AsyncClient", "AsyncGeneration"):
        from euryale.client import asynchronous

        return getattr(asynchronous, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
