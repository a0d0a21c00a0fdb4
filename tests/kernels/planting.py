"""Bugs to plant into the CUDA kernels, and whether the tests catch them."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from emulator import build


@dataclass
class Bug:
    name: str
    file: str
    right: str  # occurs once in the file
    wrong: str


@dataclass
class Suite:
    """The bugs of the kernels in one folder, and what has to catch them.

    csrc: folder of the sources, as for emulator.build.
    failure: returns the first failure of the kernels in a library, or None. It is called in another process,
        which imports its module.
    """

    csrc: Path
    bugs: list[Bug]
    failure: Callable[[Path], str | None]

    def plant(self, bug: Bug) -> dict[str, str]:
        """Return the edits for emulator.build that plant a bug."""
        text = (self.csrc / bug.file).read_text()
        assert text.count(bug.right) == 1, f"{bug.name}: {text.count(bug.right)} times in {bug.file}"
        return {bug.file: text.replace(bug.right, bug.wrong)}

    def caught(self, bug: Bug | None) -> str | None:
        """Return how the tests catch a bug or, without one, how the kernels fail; None if nothing is found.

        They run in a process of their own, whose memory a bug may write all over.
        """
        library = build(self.plant(bug) if bug else None, csrc=self.csrc)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["planted_bugs"])
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                return pool.submit(self.failure, library).result()
            except BrokenProcessPool:
                return "the process died"
