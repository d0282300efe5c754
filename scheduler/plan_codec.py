"""Encodes step plans as int32 buffers and decodes them.

Layout, in int32 words: HEADER, one SEGMENT per segment, then the tokens, parents, page ids and logits-processor inputs
of all segments. This file does not know how the buffer travels.
"""

import struct
import zlib
from typing import Any

import numpy as np

from euryale.scheduler.logits_inputs import LogitsInputs
from euryale.scheduler.sampling_params import PLAN_TYPES, params_of_plan
from euryale.scheduler.step_plan import PlanKind, Segment, StepPlan

MAGIC = 0x45555259  # "EURY"
HEADER = np.dtype(
    [(name, "<u4") for name in ("magic", "version", "checksum", "num_words", "kind", "epoch", "step", "digest")]
    + [(name, "<u4") for name in ("num_segments", "num_rows", "num_pages", "num_input_words")]
)
SEGMENT = np.dtype(
    [(name, "<i4") for name in ("num_new_tokens", "num_draft_tokens", "context", "num_pages", "num_input_words")]
    + [(name, "<i4") for name in ("emits_tokens", "wants_head_candidates", "output_index", "sample_index")]
    + list(PLAN_TYPES.items())
)
# The numbers of LogitsInputs, and the sizes of its arrays, which follow.
_NUMBERS = {name: value for name, value in vars(LogitsInputs()).items() if not isinstance(value, np.ndarray)}
_ARRAYS = {name: value for name, value in vars(LogitsInputs()).items() if isinstance(value, np.ndarray)}
INPUTS = struct.Struct(
    "<" + "".join("f" if isinstance(n, float) else "i" for n in _NUMBERS.values()) + "i" * len(_ARRAYS)
)
# Of the layout: it changes with every field, so that hosts with different code refuse each other's plans.
VERSION = zlib.crc32(repr((HEADER.descr, SEGMENT.descr, list(_NUMBERS), list(_ARRAYS), INPUTS.format)).encode())
_CHECKSUM = slice(8, 12)  # bytes of the header's field
_MASK = 0xFFFFFFFF


class PlanError(Exception):
    """A buffer that is damaged, or that holds a plan of another epoch."""


def encode(plan: StepPlan) -> np.ndarray:
    """Return the plan as one int32 buffer."""
    segments = plan.segments
    inputs = [_encode_inputs(s.logits_inputs) if s.logits_inputs is not None else None for s in segments]
    fields = np.array([_fields(s, words) for s, words in zip(segments, inputs, strict=True)], dtype=SEGMENT)
    body = [s.tokens for s in segments] + [s.parents for s in segments] + [s.pages for s in segments]
    body += [words for words in inputs if words is not None]
    payload = fields.tobytes() + (np.concatenate(body).astype(np.int32, copy=False).tobytes() if body else b"")
    header = np.zeros((), dtype=HEADER)
    header["magic"], header["version"], header["kind"] = MAGIC, VERSION, plan.kind
    header["epoch"], header["step"], header["digest"] = plan.epoch & _MASK, plan.step & _MASK, plan.digest & _MASK
    header["num_segments"], header["num_rows"] = len(segments), plan.num_rows
    header["num_pages"] = sum(len(s.pages) for s in segments)
    header["num_input_words"] = sum(len(words) for words in inputs if words is not None)
    header["num_words"] = (HEADER.itemsize + len(payload)) // 4
    buffer = bytearray(header.tobytes() + payload)
    buffer[_CHECKSUM] = zlib.crc32(buffer).to_bytes(4, "little")
    return np.frombuffer(buffer, dtype=np.int32)


def decode(buffer: np.ndarray, epoch: int) -> StepPlan:
    """Return the plan that ``encode`` wrote to the int32 ``buffer``.

    Raises PlanError if the buffer is damaged or comes from another epoch.
    """
    raw = bytearray(buffer.tobytes())
    if len(raw) < HEADER.itemsize:
        raise PlanError(f"not a plan: {len(raw)} bytes")
    header = np.frombuffer(bytes(raw[: HEADER.itemsize]), dtype=HEADER)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION or header["num_words"] != len(buffer):
        version, words = header["version"], header["num_words"]
        raise PlanError(
            f"not a plan of layout {VERSION:08x} with {len(buffer)} words: its header has layout {version:08x} and "
            f"{words} words; all hosts need the same code"
        )
    step = int(header["step"])
    raw[_CHECKSUM] = bytes(4)
    if header["checksum"] != zlib.crc32(raw):
        raise PlanError(f"the checksum of the plan of step {step} does not match")
    if header["epoch"] != epoch & _MASK:
        raise PlanError(f"a plan of epoch {header['epoch']} reached a rank of epoch {epoch}")
    num_segments, num_rows = int(header["num_segments"]), int(header["num_rows"])
    start = HEADER.itemsize + num_segments * SEGMENT.itemsize
    if start > len(raw):
        raise PlanError(f"the plan of step {step} is too short for {num_segments} segments")
    fields = np.frombuffer(bytes(raw[HEADER.itemsize : start]), dtype=SEGMENT)
    num_parents = int(fields["num_draft_tokens"].sum())
    sizes = [num_rows, num_parents, int(header["num_pages"]), int(header["num_input_words"])]
    if sum(sizes) != len(buffer) - start // 4:
        raise PlanError(f"the plan of step {step} has {len(buffer)} words, which do not match its arrays: {sizes}")
    parts = np.split(buffer[start // 4 :], np.cumsum(sizes)[:-1])
    segments = _segments(fields, *parts)
    return StepPlan(
        kind=PlanKind(int(header["kind"])),
        epoch=int(header["epoch"]),
        step=step,
        digest=int(header["digest"]),
        segments=segments,
    )


def _fields(segment: Segment, inputs: np.ndarray | None) -> tuple[float, ...]:
    """Return the segment as a row of SEGMENT; ``inputs`` int32 [words] are its encoded logits inputs."""
    return (
        segment.num_new_tokens,
        segment.num_draft_tokens,
        segment.context,
        len(segment.pages),
        0 if inputs is None else len(inputs),
        segment.emits_tokens,
        segment.wants_head_candidates,
        segment.output_index,
        segment.sample_index,
        *segment.params.plan_values,
    )


def _segments(
    fields: np.ndarray, tokens: np.ndarray, parents: np.ndarray, pages: np.ndarray, inputs: np.ndarray
) -> list[Segment]:
    """Split the arrays of all segments into segments."""
    segments, row, node, page, word = [], 0, 0, 0, 0
    for new, drafts, context, num_pages, words, emits, wants, output, sample, *params in fields.tolist():
        segments.append(
            Segment(
                tokens=tokens[row : row + new + drafts],
                parents=parents[node : node + drafts],
                pages=pages[page : page + num_pages],
                context=context,
                emits_tokens=bool(emits),
                wants_head_candidates=bool(wants),
                output_index=output,
                params=params_of_plan(*params),
                sample_index=sample,
                logits_inputs=_decode_inputs(inputs[word : word + words]) if words else None,
            )
        )
        row, node, page, word = row + new + drafts, node + drafts, page + num_pages, word + words
    return segments


def _encode_inputs(inputs: LogitsInputs) -> np.ndarray:
    """Return the inputs as int32 words."""
    values = vars(inputs)
    arrays = [values[name] for name in _ARRAYS]
    head = INPUTS.pack(*[values[name] for name in _NUMBERS], *[array.size for array in arrays])
    return np.frombuffer(b"".join([head, *[array.tobytes() for array in arrays]]), dtype=np.int32)


def _decode_inputs(words: np.ndarray) -> LogitsInputs:
    """Return the inputs that ``_encode_inputs`` wrote to ``words``, int32."""
    start = INPUTS.size // 4
    head = INPUTS.unpack(words[:start].tobytes())
    fields: dict[str, Any] = dict(zip(_NUMBERS, head, strict=False))
    for (name, empty), size in zip(_ARRAYS.items(), head[len(_NUMBERS) :], strict=True):
        fields[name] = words[start : start + size].view(empty.dtype).reshape(*empty.shape[:-1], -1)
        start += size
    return LogitsInputs(**fields)
