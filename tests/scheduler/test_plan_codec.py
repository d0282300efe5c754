"""The plan buffer: decoding inverts encoding, and damaged buffers are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from euryale.scheduler.logits_inputs import LogitsInputs
from euryale.scheduler.plan_codec import PlanError, decode, encode
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import PlanKind, Segment, StepPlan

int32s = st.integers(0, 2**31 - 1)


def arrays(dtype, *shape):
    count = int(np.prod(shape))
    values = int32s if dtype == np.int32 else st.floats(-100, 100, width=32)
    return st.lists(values, min_size=count, max_size=count).map(lambda x: np.asarray(x, dtype=dtype).reshape(shape))


@st.composite
def inputs(draw):
    seen, biased = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    single = st.floats(-100, 100, width=32)
    return LogitsInputs(
        repetition=draw(single),
        frequency=draw(single),
        presence=draw(single),
        history=draw(arrays(np.int32, 2, seen)),
        bias_ids=draw(arrays(np.int32, biased)),
        bias=draw(arrays(np.float32, biased)),
        min_tokens=draw(int32s),
        ends=draw(arrays(np.int32, draw(st.integers(0, 3)))),
        logprobs=draw(st.integers(-1, 20)),
        prompt_logprobs=draw(st.integers(-1, 20)),
        first_target=draw(int32s),
        targets=draw(arrays(np.int32, draw(st.integers(0, 3)))),
    )


@st.composite
def segments(draw):
    num_new_tokens, num_draft_tokens = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    return Segment(
        tokens=np.asarray(
            draw(
                st.lists(int32s, min_size=num_new_tokens + num_draft_tokens, max_size=num_new_tokens + num_draft_tokens)
            )
        ),
        parents=np.asarray([draw(st.integers(0, i)) for i in range(num_draft_tokens)], dtype=np.int32),
        pages=np.asarray(draw(st.lists(int32s, max_size=4)), dtype=np.int32),
        context=draw(int32s),
        emits_tokens=draw(st.booleans()),
        wants_head_candidates=draw(st.booleans()),
        output_index=draw(int32s),
        sample_index=draw(int32s),
        logits_inputs=draw(st.none() | inputs()),
        params=SamplingParams(
            temperature=draw(st.just(0.0) | st.floats(0.001, 100)),
            top_k=draw(int32s),
            top_p=draw(st.floats(1e-40, 1)),
            min_p=draw(st.floats(0, 1)),
            seed=draw(st.integers(0, 2**64 - 1)),
            acceptance=draw(st.sampled_from(["exact", "typical"])),
            epsilon=draw(st.floats(0, 1)),
            delta=draw(st.floats(0, 1)),
        ),
    )


def as_plain(plan: StepPlan):
    parts = [
        (
            s.tokens.tolist(),
            s.parents.tolist(),
            s.pages.tolist(),
            s.context,
            s.emits_tokens,
            s.wants_head_candidates,
            s.output_index,
            s.sample_index,
            s.params,
            s.logits_inputs
            and [x.tolist() if isinstance(x, np.ndarray) else x for x in vars(s.logits_inputs).values()],
        )
        for s in plan.segments
    ]
    return plan.kind, plan.epoch, plan.step, plan.digest, parts


@settings(max_examples=60)
@given(st.lists(segments(), max_size=4), int32s, int32s, st.integers(0, 2**32 - 1), st.sampled_from(PlanKind))
def test_a_decoded_plan_is_the_plan(parts, epoch, step, digest, kind):
    plan = StepPlan(kind=kind, epoch=epoch, step=step, digest=digest, segments=parts)
    buffer = encode(plan)
    assert buffer.dtype == np.int32
    assert as_plain(decode(buffer, epoch)) == as_plain(plan)


@settings(max_examples=60)
@given(st.lists(segments(), min_size=1, max_size=2), st.data())
def test_a_damaged_plan_is_refused(parts, data):
    buffer = encode(StepPlan(epoch=3, segments=parts))
    word, bit = data.draw(st.integers(0, len(buffer) - 1)), data.draw(st.integers(0, 31))
    buffer.view(np.uint32)[word] ^= np.uint32(1 << bit)
    with pytest.raises(PlanError):
        decode(buffer, 3)


def test_a_plan_of_another_epoch_is_refused():
    with pytest.raises(PlanError, match="epoch 3"):
        decode(encode(StepPlan(epoch=3)), 4)
