"""Train Medusa heads: ``torchrun --nproc-per-node N launch/train.py medusa1|medusa2|distill|calibrate ...``.

Train the demo model: ``launch/train.py pretrain|demo ...``. Also runs without torchrun, as a group of one. The last
line on stdout is one JSON object of results. Repeating the command of a stopped training resumes at its last
checkpoint. See docs/training.md.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

for noisy in ("torchao", "torch.utils._pytree", "transformers"):  # their warnings do not concern users of this program
    logging.getLogger(noisy).setLevel(logging.ERROR)

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # for a checkout that is not installed

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from euryale.parallel.group import LOADING_TIMEOUT, Group, join
from euryale.runtime.flags import FlagParser, add_flags, from_flags
from euryale.runtime.worker import leave, refuse, start_worker
from euryale.training import calibrate, distill, medusa1, medusa2
from euryale.training.demo import build as demo
from euryale.training.demo import pretrain
from euryale.training.demo.build import DemoOptions
from euryale.training.demo.pretrain import PretrainOptions
from euryale.training.options import CalibrateOptions, DistillOptions, Medusa1Options, Medusa2Options

COMMANDS: dict[str, tuple[Callable[[Any, Group], dict[str, Any] | None], type]] = {
    "medusa1": (medusa1.run, Medusa1Options),
    "medusa2": (medusa2.run, Medusa2Options),
    "distill": (distill.run, DistillOptions),
    "calibrate": (calibrate.run, CalibrateOptions),
    "pretrain": (pretrain.run, PretrainOptions),
    "demo": (demo.run, DemoOptions),
}


def parser() -> FlagParser:
    """Return the parser of all commands."""
    found = FlagParser(description=__doc__, usage="%(prog)s COMMAND FLAGS")
    subcommands = found.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=found.prog)
    for name, (_, options) in COMMANDS.items():
        about = " ".join((options.__doc__ or "").split())
        add_flags(subcommands.add_parser(name, help=about, description=about), options)
    return found


def main() -> int:
    """Run the command line and return the exit code."""
    args = parser().parse_args()
    run, options = COMMANDS[args.command]
    start_worker()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    disable_progress_bar()
    set_verbosity_error()
    try:
        chosen = from_flags(options, args)
        group = join(LOADING_TIMEOUT, getattr(chosen, "device", "auto"))
        if not group.is_leader:
            logging.getLogger("euryale").setLevel(logging.ERROR)
        result = run(chosen, group)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped: repeat the command to resume", file=sys.stderr, flush=True)
        return 130
    if group.is_leader:
        print(json.dumps(result), flush=True)
    group.close()
    return 0


if __name__ == "__main__":
    leave(main())
