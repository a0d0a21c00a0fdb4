"""Run train.py with the small network registered; the processes that it starts run this file too."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parents[1]), str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from small_network import registered  # noqa: E402

import train  # noqa: E402
from utils.args import exit_status  # noqa: E402

if __name__ == "__main__":
    with registered():
        sys.exit(exit_status(train.main))
