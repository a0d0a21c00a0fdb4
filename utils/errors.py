"""Errors that end a command with one line instead of a traceback (see `utils.args.exit_status`)."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input (exit status 2). The message is one line: which flag or file, what is wrong, what to do."""

    #: Whether to print nothing, because another process of this machine prints the same line.
    silent = False


class UsageError(InputError):
    """An invalid flag, or a file or folder given by a flag that can't be used."""


class DataError(InputError):
    """An invalid picture, label, list or class table of a data set."""


class CheckpointError(InputError):
    """A checkpoint that can't be used."""


class RunError(RuntimeError):
    """A runtime failure not caused by the input (exit status 1). The message is one line, with a remedy."""

    silent = False
