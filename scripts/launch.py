"""torchrun with what makes restarts reliable, its report in one line, and an exit code that says how a run ended.

python scripts/launch.py --nproc_per_node=2 scripts/train.py --cache_dir DIR ...

It takes every flag of torchrun, and forwards SIGTERM and SIGUSR1 to the ranks, which save and end.
Exit codes: 0 finished; 128 + n stopped by signal n; otherwise that of the first rank that failed.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

# This repository's `trainer` must win over anything installed by that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.process import run_command
from trainer.launchers import doubled

# A flag that is given wins over these.
DEFAULTS = [
    # Of a group that crashed. An error that a restart cannot mend ends the next attempts at once.
    "--max-restarts=3",
    # SIGUSR1 is what SLURM sends ahead of its time limit.
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    # After a signal: seconds for saving, then SIGKILL.
    "--shutdown-timeout=300",
]


def main(argv: list[str] | None = None) -> int:
    """Launch and watch the ranks of this node; returns the exit code."""
    # With the launcher's store shared, ranks that are restarted after a SIGKILL often fail to connect.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What it says of ranks that end is said below, in one line; of signals, by the ranks.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)

    arguments = parse_args([*DEFAULTS, *(sys.argv[1:] if argv is None else argv)])
    nodes = int(arguments.nnodes.rpartition(":")[2])
    if fault := doubled(os.environ, nodes=nodes):
        print(f"launch.py: error: {fault}", file=sys.stderr, flush=True)
        return 2
    try:
        run(arguments)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        print(f"launch.py: rank {rank} ended with {how}", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    run_command(main)
