"""The demo: starts a group of two ranks on the demo checkpoint, queries it over ZeroMQ, and compares plain decoding.

The text between two small numbers was emitted by one decoding step; the number after it counts its tokens. Needs no GPU
and no download.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.append(str(ROOT / "src"))  # finds this checkout if Euryale is not installed

from euryale.client import Client

MODEL = ROOT / "demo" / "model"
PROMPTS = ["def ", "class ", "import ", "def read_lines(path):\n", "class TestParser(unittest.TestCase):\n"]
MAX_TOKENS = 64
SEED = 1  # of the streamed answers; the measured ones are greedy
SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def start() -> tuple[subprocess.Popen, str]:
    """Start the group; returns its process and the address of its front end."""
    serve = ["--nproc-per-node", "2", str(ROOT / "launch" / "serve.py"), "--device", "cpu", "--dtype", "float32"]
    serve += ["--model", str(MODEL), "--served-model-name", "euryale-demo", "--bind", "tcp://127.0.0.1:0"]
    serve += ["--no-draft-from-traffic"]  # repeated prompts must not speed up the second run
    print("starting:", " ".join(["torchrun", *serve]), flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", *serve]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}  # otherwise torchrun prints a warning
    group = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet)
    assert group.stdout is not None
    for line in group.stdout:
        if line.startswith("ready "):
            return group, line.split()[1]
    raise SystemExit(f"the group ended with code {group.wait()} before it was ready: see its message above")


def stream(client: Client, prompt: str) -> None:
    """Print an answer as it arrives, with the number of tokens of each step."""
    colour = sys.stdout.isatty()
    print(f"\n\033[1m{prompt}\033[0m" if colour else f"\n{prompt}", end="", flush=True)
    for delta in client.generate(prompt, max_tokens=MAX_TOKENS, seed=SEED):
        count = "+".join(map(str, delta.tokens_per_step)).translate(SMALL)
        mark = f"\033[36m{count}\033[0m" if colour else count
        print(delta.text + mark, end="", flush=True)
    print()


def measure(client: Client, speculation: bool) -> tuple[float, float, list[list[int]]]:
    """Return tokens per second, mean acceptance length, and the answers of all prompts, one request at a time."""
    started, steps = time.perf_counter(), 0
    answers: list[list[int]] = []
    for prompt in PROMPTS:
        greedy = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
        result = client.generate(prompt, speculation=speculation, **greedy).result()
        answers.append(list(result.tokens))
        steps += len(result.tokens_per_step)
    tokens = sum(map(len, answers))
    return tokens / (time.perf_counter() - started), tokens / steps, answers


def main() -> int:
    """Run the demo; returns the group's exit code."""
    group, address = start()
    try:
        with Client(address) as client:
            info = client.hello()
            print(f"{info.model} at {address}: {info.tensor_parallel_size} ranks, {info.num_medusa_heads} Medusa heads")
            print("small numbers: tokens of each step; sampled at the model's default temperature")
            for prompt in PROMPTS:
                stream(client, prompt)
            plain_rate, _, plain = measure(client, speculation=False)
            tree_rate, mean_length, tree = measure(client, speculation=True)
            print("\ngreedy, one request at a time:")
            print(f"without speculation    {plain_rate:7.1f} tokens/s")
            print(f"with Medusa trees      {tree_rate:7.1f} tokens/s  ({tree_rate / plain_rate:.2f}x)")
            print(f"mean acceptance length {mean_length:7.2f} tokens per step")
            print(f"answers identical      {sum(a == b for a, b in zip(plain, tree, strict=True))} of {len(PROMPTS)}")
            client.drain()
        code = group.wait(60)
    finally:
        if group.poll() is None:
            group.terminate()
            group.wait(60)
    print(f"the group stopped with exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
