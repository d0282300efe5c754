"""The step plan: what one step computes, as plain data and as one int32 buffer.

Every request in a plan is a *segment* of rows: first its rows of known tokens (prompt or answer tokens not yet
computed, a chain), then its draft rows (a candidate tree whose root is the last row of a known token). A segment
carries all a rank has to know of its request, so that ranks keep no state between steps but the KV cache.

Buffer layout, in int32 words: a header, then per segment its fields, then row tokens, row parents, page ids,
logits_inputs. This file does not know how the buffer travels.
"""

import enum
import struct
import zlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from euryale.scheduler import logits_inputs
from euryale.scheduler.logits_inputs import LogitsInputs
from euryale.scheduler.sampling_params import ACCEPTANCE_RULES, SamplingParams

MAGIC = 0x45555259  # "EURY"
VERSION = 2
# magic, version, checksum, length, kind, epoch, step, digest, segments, rows, pages, words of logits_inputs
_HEADER = struct.Struct("<12I")
# rows of known tokens, drafts, context, pages, words of logits_inputs, samples, wants_head_candidates, position,
# sample; temperature, top_k, top_p, min_p, seed, acceptance, epsilon, delta
_SEGMENT = struct.Struct("<9i" + "fiffQiff")
_CHECKSUM = slice(8, 12)  # bytes of the buffer


class PlanKind(enum.IntEnum):
    STEP = 0
    HEARTBEAT = 1  # nothing to compute: tells the other ranks that rank 0 lives
    STOP = 2  # leave the loop


class PlanError(Exception):
    """A plan buffer that cannot be what rank 0 sent, or that belongs to another run of the group."""


@dataclass(slots=True, kw_only=True)  # not frozen, which takes four times as long to make: there are many in a step
class Segment:
    """One request's rows of a step.

    ``tokens`` int32 [num_new_tokens + num_draft_tokens]; ``parents`` int32 [num_draft_tokens], the parent's node in the
    candidate tree (0: the root, i.e. the last row of a known token); ``pages`` int32, the request's pages in order;
    ``context`` tokens are committed already. ``samples``: the last row of a known token is the last known token, so the
    step emits tokens for this request. ``position``: output tokens so far, the counter of the noise; ``sample``: which
    of the request's independent answers this is. ``logits_inputs``: what goes beyond ``params``, None for most
    requests.
    """

    tokens: np.ndarray
    parents: np.ndarray
    pages: np.ndarray
    context: int
    emits_tokens: bool
    wants_head_candidates: bool
    output_index: int
    params: SamplingParams
    sample_index: int = 0
    logits_inputs: LogitsInputs | None = None

    @property
    def has_result(self) -> bool:
        """Whether the step finds anything for this request: tokens, or log-probabilities of its prompt."""
        return self.emits_tokens or (self.logits_inputs is not None and len(self.logits_inputs.targets) > 0)

    @property
    def num_draft_tokens(self) -> int:
        return len(self.parents)

    @property
    def num_new_tokens(self) -> int:
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
    fields = b"".join(_SEGMENT.pack(*_fields(s)) for s in segments)
    logits_inputs = [logits_inputs.pack(s.logits_inputs) for s in segments if s.logits_inputs is not None]
    body = [s.tokens for s in segments]
    # Certain rows have no parent in the tree.
    body += [part for s in segments for part in (np.full(s.num_new_tokens, -1, dtype=np.int32), s.parents)]
    body += [s.pages for s in segments] + logits_inputs
    payload = fields + (np.concatenate(body).astype(np.int32, copy=False).tobytes() if body else b"")
    counts = (len(segments), plan.num_rows, sum(len(s.pages) for s in segments), sum(map(len, logits_inputs)))
    length = (_HEADER.size + len(payload)) // 4
    marks = (plan.epoch & 0xFFFFFFFF, plan.step & 0xFFFFFFFF, plan.digest & 0xFFFFFFFF)
    buffer = bytearray(_HEADER.pack(MAGIC, VERSION, 0, length, int(plan.kind), *marks, *counts) + payload)
    buffer[_CHECKSUM] = zlib.crc32(buffer).to_bytes(4, "little")
    return np.frombuffer(buffer, dtype=np.int32)


def decode(buffer: np.ndarray, epoch: int) -> StepPlan:
    """The plan that ``encode`` wrote; PlanError if the buffer is damaged or from another epoch."""
    raw = bytearray(buffer.tobytes())
    if len(raw) < _HEADER.size:
        raise PlanError(f"not a plan: {len(raw)} bytes")
    magic, version, checksum, length, kind, its_epoch, step, digest, *counts = _HEADER.unpack_from(raw)
    if magic != MAGIC or version != VERSION or length != len(buffer):
        raise PlanError(f"not a plan of version {VERSION} with {len(buffer)} words but {version}, {length}")
    raw[_CHECKSUM] = bytes(4)
    if checksum != zlib.crc32(raw):
        raise PlanError(f"the checksum of the plan of step {step} does not match")
    if its_epoch != epoch & 0xFFFFFFFF:
        raise PlanError(f"a plan of epoch {its_epoch} reached a rank of epoch {epoch}")
    num_segments, num_rows, num_pages, num_words = counts
    sizes = [(_HEADER.size + num_segments * _SEGMENT.size) // 4, num_rows, num_rows, num_pages, num_words]
    if sum(sizes) != len(buffer):
        raise PlanError(f"the plan of step {step} does not add up: {sizes}, {len(buffer)} words")
    head, tokens, parents, pages, logits_inputs = np.split(buffer, np.cumsum(sizes)[:-1])
    segments, row, page, word = [], 0, 0, 0
    for (
        certain,
        drafts,
        context,
        num,
        words,
        emits_tokens,
        wants,
        output_index,
        sample_index,
        *params,
    ) in _SEGMENT.iter_unpack(head.tobytes()[_HEADER.size :]):
        stop = row + certain + drafts
        segments.append(
            Segment(
                tokens=tokens[row:stop],
                parents=parents[row + certain : stop],
                pages=pages[page : page + num],
                context=context,
                emits_tokens=bool(emits_tokens),
                wants_head_candidates=bool(wants),
                output_index=output_index,
                params=_params(*params),
                sample_index=sample_index,
                logits_inputs=logits_inputs.unpack(logits_inputs[word : word + words]) if words else None,
            )
        )
        row, page, word = stop, page + num, word + words
    return StepPlan(kind=PlanKind(kind), epoch=its_epoch, step=step, digest=digest, segments=segments)


def _fields(segment: Segment) -> tuple:
    params = segment.params
    return (
        segment.num_new_tokens,
        segment.num_draft_tokens,
        segment.context,
        len(segment.pages),
        0 if segment.logits_inputs is None else logits_inputs.num_words(segment.logits_inputs),
        segment.emits_tokens,
        segment.wants_head_candidates,
        segment.output_index,
        segment.sample_index,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seed,
        ACCEPTANCE_RULES.index(params.acceptance),
        params.epsilon,
        params.delta,
    )


@lru_cache(maxsize=4096)  # a request's are the same in all its steps
def _params(temperature, top_k, top_p, min_p, seed, acceptance, epsilon, delta) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        acceptance=ACCEPTANCE_RULES[acceptance],
        epsilon=epsilon,
        delta=delta,
    )
