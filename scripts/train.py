"""Fine-tune a Qwen model under FSDP2.

torchrun --nproc_per_node=2 scripts/train.py --cache_dir DIR [--model.name ... --data.name ...]
python scripts/train.py --cache_dir DIR     (one process)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.errors import DataError
from models.errors import ModelError
from scripts.command_line import CommandLineError, parse_train_config
from scripts.environment import remove_launcher_folders, use_cache_dir
from trainer.errors import TrainError


def main(argv: list[str] | None = None) -> int:
    """Run one training job; returns the process's exit code.

    0: finished. 1: the job cannot go on. 2: the command line is wrong. 128 + n: stopped by signal n, state saved.
    """
    ranks = None
    try:
        config = parse_train_config(argv)
        cache_dir = use_cache_dir(config.cache_dir)
        # Only now: what follows imports libraries that read the cache variables when they are imported.
        from scripts.wiring import run
        from trainer.distributed import meet

        ranks = meet()
        return run(config, cache_dir, ranks)
    except (CommandLineError, DataError, ModelError, TrainError) as error:
        from trainer.distributed import claim_report, leave, meet

        ranks = ranks or meet()
        if claim_report(ranks):
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        leave(ranks)
        return 2 if isinstance(error, CommandLineError) else 1
    except KeyboardInterrupt:  # before the first step, or a second one while the state is saved
        if os.environ.get("RANK", "0") == "0":
            print("train.py: interrupted", file=sys.stderr, flush=True)
        return 130
    finally:
        remove_launcher_folders()


if __name__ == "__main__":
    sys.exit(main())
