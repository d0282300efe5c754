"""Serve a model: ``torchrun --nproc-per-node N launch/serve.py --model DIR [--medusa DIR] [--tree dynamic]``.

Rank 0 prints ``ready ADDRESS`` once it accepts requests. SIGTERM, Ctrl-C and the client's ``drain`` stop it cleanly.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # for a checkout that is not installed

from euryale.frontend.config import FrontEndConfig
from euryale.frontend.process import FrontEndProcess
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.flags import FlagParser, add_flags, from_flags
from euryale.runtime.model.config import load_model_config
from euryale.runtime.server import Server
from euryale.runtime.worker import leave, run_worker


def parser() -> FlagParser:
    """Return the parser of all flags."""
    found = FlagParser(description=__doc__)
    found.add_argument(
        "--served-model-name",
        default="",
        metavar="TEXT",
        help="the model's name for clients (default: the name of its directory)",
    )
    add_flags(found, EngineConfig)
    add_flags(found, FrontEndConfig)
    return found


def main() -> int:
    """Run the command line and return this rank's exit code."""
    args = parser().parse_args()

    def config() -> EngineConfig:
        from_flags(FrontEndConfig, args)  # refuse bad flags on every rank, before anything is loaded
        return from_flags(EngineConfig, args)

    def prepare(engine: EngineConfig) -> FrontEndProcess:
        vocab_size = load_model_config(engine.model, engine.dtype).vocab_size
        return FrontEndProcess(engine.model, vocab_size, from_flags(FrontEndConfig, args))

    def lead(engine: Engine, front_end: FrontEndProcess) -> None:
        Server(engine, front_end, args.served_model_name).run()

    return run_worker(config, prepare, lead)


if __name__ == "__main__":
    leave(main())
