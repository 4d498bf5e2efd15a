"""`python -m engine.training CONFIG.yaml`: train, or go on training, what the file describes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.errors import EngineError
from engine.training.config import TrainingConfig
from engine.training.run import train


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.training", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file; docs/training.md lists its entries")
    given = parser.parse_args(arguments)
    try:
        train(TrainingConfig.read(given.config), say=lambda line: print(line, flush=True))  # noqa: T201
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
