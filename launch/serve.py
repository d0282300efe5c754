"""Serve a model: ``torchrun --nproc-per-node N launch/serve.py --model DIR [--medusa DIR] [--tree dynamic]``.

Rank 0 prints ``ready ADDRESS`` when requests are taken. SIGTERM, Ctrl-C and the client's ``drain`` stop it cleanly.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # where nothing is installed, this checkout

from euryale.frontend.config import FrontEndConfig
from euryale.runtime.config import EngineConfig
from euryale.runtime.flags import add_flags, from_flags
from euryale.runtime.server import Server
from euryale.runtime.worker import leave, run_worker


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--served-model-name", default="", help="what clients call the model (default: its directory)")
    add_flags(parser, EngineConfig)
    add_flags(parser, FrontEndConfig)
    args = parser.parse_args()

    def config() -> EngineConfig:
        from_flags(FrontEndConfig, args)  # refuse bad flags on every rank, before anything is loaded
        return from_flags(EngineConfig, args)

    def lead(engine) -> None:
        Server(engine, args.served_model_name, from_flags(FrontEndConfig, args)).run()

    return run_worker(config, lead)


if __name__ == "__main__":
    leave(main())
