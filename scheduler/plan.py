"""The step plan: what one step computes, as plain data and as one int32 buffer.

Every request in a plan is a *segment* of rows: first its certain rows (prompt or answer tokens not yet
computed, a chain), then its draft rows (a candidate tree whose root is the last certain row). A segment carries
all a rank has to know of its request, so that ranks keep no state between steps but the KV cache.

Buffer layout: HEADER words, then per segment FIELDS words, then row tokens, row parents, page ids. 64-bit
values are two words, floats are their bits. This file does not know how the buffer travels.
"""

import enum
import zlib
from dataclasses import dataclass, field

import numpy as np

from euryale.scheduler.params import ACCEPTANCE_RULES, SamplingParams

MAGIC = 0x45555259  # "EURY"
VERSION = 1
HEADER = ("magic", "version", "checksum", "length", "kind", "epoch", "step", "digest", "segments", "rows", "pages")
FIELDS = (
    "num_certain",
    "num_drafts",
    "context",
    "num_pages",
    "samples",
    "wants_candidates",
    "position",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed_low",
    "seed_high",
    "acceptance",
    "epsilon",
    "delta",
)


class PlanKind(enum.IntEnum):
    STEP = 0
    HEARTBEAT = 1  # nothing to compute: tells the other ranks that rank 0 lives
    STOP = 2  # leave the loop


class PlanError(Exception):
    """A plan buffer that cannot be what rank 0 sent, or that belongs to another run of the group."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One request's rows of a step.

    ``tokens`` int32 [num_certain + num_drafts]; ``parents`` int32 [num_drafts], the parent's node in the
    candidate tree (0: the root, i.e. the last certain row); ``pages`` int32, the request's pages in order;
    ``context`` tokens are committed already. ``samples``: the last certain row is the last known token, so the
    step emits tokens for this request. ``position``: output tokens so far, the counter of the noise.
    """

    tokens: np.ndarray
    parents: np.ndarray
    pages: np.ndarray
    context: int
    samples: bool
    wants_candidates: bool
    position: int
    params: SamplingParams

    @property
    def num_drafts(self) -> int:
        return len(self.parents)

    @property
    def num_certain(self) -> int:
        return len(self.tokens) - len(self.parents)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """``digest`` is rank 0's digest of all tokens accepted so far; a rank with another one has diverged."""

    kind: PlanKind = PlanKind.STEP
    epoch: int = 0
    step: int = 0
    digest: int = 0
    segments: list[Segment] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(len(s.tokens) for s in self.segments)


def encode(plan: StepPlan) -> np.ndarray:
    """The plan as one int32 buffer."""
    segments = plan.segments
    fields = np.asarray([_fields(s) for s in segments], dtype=np.int64).reshape(len(segments), len(FIELDS))
    body = [fields.astype(np.uint32).view(np.int32).ravel()]
    body += [s.tokens for s in segments]
    # Certain rows have no parent in the tree.
    body += [part for s in segments for part in (np.full(s.num_certain, -1, dtype=np.int32), s.parents)]
    body += [s.pages for s in segments]
    payload = np.concatenate(body).astype(np.int32, copy=False)
    counts = {"segments": len(segments), "rows": plan.num_rows, "pages": sum(len(s.pages) for s in segments)}
    values = {"magic": MAGIC, "version": VERSION, "length": len(HEADER) + len(payload), "kind": int(plan.kind)}
    values |= {"epoch": plan.epoch, "step": plan.step, "digest": plan.digest} | counts
    values["checksum"] = 0
    header = np.asarray([values[name] for name in HEADER], dtype=np.int64).astype(np.uint32).view(np.int32)
    buffer = np.concatenate([header, payload])
    buffer[HEADER.index("checksum")] = _checksum(buffer)
    return buffer


def decode(buffer: np.ndarray, epoch: int) -> StepPlan:
    """The plan that ``encode`` wrote; PlanError if the buffer is damaged or from another epoch."""
    header = {name: int(v) for name, v in zip(HEADER, buffer[: len(HEADER)].view(np.uint32), strict=True)}
    if header["magic"] != MAGIC or header["version"] != VERSION or header["length"] != len(buffer):
        raise PlanError(f"not a plan of version {VERSION} with {len(buffer)} words: {header}")
    if header["checksum"] != int(np.asarray(_checksum(buffer)).view(np.uint32)):
        raise PlanError(f"the checksum of the plan of step {header['step']} does not match")
    if header["epoch"] != epoch & 0xFFFFFFFF:
        raise PlanError(f"a plan of epoch {header['epoch']} reached a rank of epoch {epoch}")
    num_segments, num_rows, num_pages = header["segments"], header["rows"], header["pages"]
    sizes = [num_segments * len(FIELDS), num_rows, num_rows, num_pages]
    if len(HEADER) + sum(sizes) != len(buffer):
        raise PlanError(f"the plan of step {header['step']} does not add up: {header}")
    fields, tokens, parents, pages = np.split(buffer[len(HEADER) :], np.cumsum(sizes)[:-1])
    segments, row, page = [], 0, 0
    for values in fields.reshape(num_segments, len(FIELDS)):
        named = dict(zip(FIELDS, values, strict=True))
        rows = int(named["num_certain"] + named["num_drafts"])
        segments.append(
            Segment(
                tokens=tokens[row : row + rows],
                parents=parents[row + int(named["num_certain"]) : row + rows],
                pages=pages[page : page + int(named["num_pages"])],
                context=int(named["context"]),
                samples=bool(named["samples"]),
                wants_candidates=bool(named["wants_candidates"]),
                position=int(named["position"]),
                params=_params(named),
            )
        )
        row, page = row + rows, page + int(named["num_pages"])
    kind = PlanKind(header["kind"])
    return StepPlan(kind=kind, epoch=epoch, step=header["step"], digest=header["digest"], segments=segments)


def _checksum(buffer: np.ndarray) -> np.int32:
    """CRC-32 of the buffer with a zero in the checksum's place."""
    at = HEADER.index("checksum")
    crc = zlib.crc32(buffer[at + 1 :].tobytes(), zlib.crc32(buffer[:at].tobytes()))
    return np.uint32(crc).view(np.int32)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _float(word: np.int32) -> float:
    return float(word.view(np.float32))


def _fields(segment: Segment) -> list[int]:
    params = segment.params
    return [
        segment.num_certain,
        segment.num_drafts,
        segment.context,
        len(segment.pages),
        segment.samples,
        segment.wants_candidates,
        segment.position,
        _bits(params.temperature),
        params.top_k,
        _bits(params.top_p),
        _bits(params.min_p),
        params.seed & 0xFFFFFFFF,
        params.seed >> 32,
        ACCEPTANCE_RULES.index(params.acceptance),
        _bits(params.epsilon),
        _bits(params.delta),
    ]


def _params(named: dict[str, np.int32]) -> SamplingParams:
    return SamplingParams(
        temperature=_float(named["temperature"]),
        top_k=int(named["top_k"]),
        top_p=_float(named["top_p"]),
        min_p=_float(named["min_p"]),
        seed=int(named["seed_low"].view(np.uint32)) | int(named["seed_high"].view(np.uint32)) << 32,
        acceptance=ACCEPTANCE_RULES[int(named["acceptance"])],
        epsilon=_float(named["epsilon"]),
        delta=_float(named["delta"]),
    )
