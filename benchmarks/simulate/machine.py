"""Roofline models of the step time of decoder models on one or several H200-class GPUs.

A step consists of products with weights, attention, small kernels and collectives, which run one after the other. Each
takes the longer of its memory traffic and its arithmetic. Sources of the figures:

* NVIDIA's H200 data sheet: 141 GB at 4.8 TB/s, 989 TFLOP/s dense bfloat16. Published measurements: 4.3 TB/s for copies,
  about 790 TFLOP/s for large products, and 70 to 90 % of the bandwidth for paged decode attention, taken as 80 %.
* All-reduce by NCCL on eight H100 over NVLink, as published by users (ByteDance-Seed/Triton-distributed, issue 57): 19
  us for 128 B, 32 us for 1 MiB, 136 us for 16 MiB, taken as 19 us and 144 GB/s.
* A kernel takes at least about 2 us in a CUDA graph, and about 6 us when called from Python (assumed). Decoding steps
  are graphs, padded to buckets. Steps with prompts are not, and take at least the time of their calls.
* The host's part of a step, for which the GPU waits: planning as measured with this simulator's scheduler on one core
  of a shared AMD EPYC (`benchmarks/planning.py`), rounded; 150 us for copies and launches are assumed.

Every figure can be replaced by a measurement.
"""

from dataclasses import dataclass

from euryale.runtime.step_graphs import bucket
from euryale.scheduler.step_plan import Segment

_BYTES = 2  # bytes of a bfloat16
_KERNELS, _SMALL_KERNELS = 11, 6  # kernels of a layer: all, and those bound by latency
_PASSES = 12  # passes of a layer's small kernels over a row's activations


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a decoder with Medusa heads that have their own lm_heads, as published ones do."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Parameters of the matrices of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


@dataclass(frozen=True, kw_only=True)
class Machine:
    """``gpus`` over which one model is sharded.

    Sizes are in bytes, times in seconds, and rates per second and GPU. ``host_drafting``: the host's time to select
    draft tokens.
    """

    model: ModelShape
    gpus: int
    memory: float = 141e9
    read: float = 4.3e12
    attention_read: float = 0.8 * 4.8e12
    flops: float = 790e12
    all_reduce: float = 19e-6
    all_reduce_rate: float = 144e9
    kernel: float = 2e-6
    call: float = 6e-6
    host: float = 150e-6
    host_per_request: float = 6e-6
    host_per_draft_token: float = 0.4e-6
    host_drafting: float = 80e-6
    host_drafting_per_request: float = 12e-6

    @property
    def kv_bytes(self) -> float:
        """Bytes of one token's keys and values on each GPU."""
        model = self.model
        return 2 * model.layers * max(1, model.kv_heads // self.gpus) * model.head_dim * _BYTES

    def pages(self, page_size: int, num_medusa: int) -> int:
        """Return the KV pages in nine tenths of the memory, less the weights and 4 GB of activations."""
        model = self.model
        lm_head = model.hidden * model.vocab
        weights = model.layers * model.layer_weights + 2 * lm_head + num_medusa * (model.hidden**2 + lm_head)
        room = 0.9 * self.memory - 4e9 - _BYTES * weights / self.gpus
        return int(room / self.kv_bytes / page_size)

    def seconds(self, segments: list[Segment], num_medusa: int, most_rows: int) -> float:
        """Return the device's seconds of a step of these segments; ``most_rows``: rows of the largest step."""
        model, rows = self.model, sum(len(s.tokens) for s in segments)
        is_decode = all(s.emits_tokens and s.num_new_tokens == 1 for s in segments)
        requests = sampled = len(segments)
        if is_decode:
            rows, requests = bucket(rows, requests, most_rows)
            sampled = rows
        else:
            sampled = sum(s.num_draft_tokens + 1 for s in segments if s.emits_tokens)
        device = model.layers * self._product(model.layer_weights, rows) + self._product(
            model.hidden * model.vocab, sampled
        )
        device += self._attention(segments) + self._small(rows) + self._reduce(2 * model.layers + 1, rows)
        if any(s.wants_head_candidates for s in segments):
            device += self._product(num_medusa * model.hidden**2, requests) + 2 * self._reduce(1, 0)
            device += self._product(num_medusa * model.hidden * model.vocab, requests)
        return device if is_decode else max(device, model.layers * _KERNELS * self.call)

    def host_seconds(self, requests: int, num_draft_tokens: int, considers_drafts: bool) -> float:
        """Return the host's seconds of a step; ``considers_drafts``: draft tokens are selected for this step."""
        seconds = self.host + self.host_per_request * requests + self.host_per_draft_token * num_draft_tokens
        return seconds + considers_drafts * (self.host_drafting + self.host_drafting_per_request * requests)

    def _product(self, weights: float, rows: int) -> float:
        """Return the seconds of ``rows`` times a matrix of ``weights`` parameters, sharded over the GPUs."""
        return max(_BYTES * weights / self.read, 2 * weights * rows / self.flops) / self.gpus

    def _attention(self, segments: list[Segment]) -> float:
        """Return the longer of reading each request's context once and its rows' products with the context."""
        read = 0.0
        per_pair = 4 * self.model.layers * self.model.heads * self.model.head_dim / self.gpus / self.flops
        per_token = self.kv_bytes / self.attention_read
        for segment in segments:
            tokens, rows = segment.context, len(segment.tokens)
            read += max((tokens + rows) * per_token, rows * (tokens + rows / 2) * per_pair)
        return read

    def _small(self, rows: int) -> float:
        traffic = _PASSES * rows * self.model.hidden * _BYTES / self.read
        return self.model.layers * (_SMALL_KERNELS * self.kernel + traffic)

    def _reduce(self, count: int, rows: int) -> float:
        if self.gpus == 1:
            return 0.0
        return count * (self.all_reduce + rows * self.model.hidden * _BYTES / self.all_reduce_rate)


LLAMA_7B = ModelShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000)
LLAMA_70B = ModelShape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000)
MACHINES = {"7b": Machine(model=LLAMA_7B, gpus=1), "70b": Machine(model=LLAMA_70B, gpus=8)}
