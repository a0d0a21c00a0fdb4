"""The errors that end a command with one line instead of a traceback (utils.args.exit_status)."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input, exit status 2: one line that names the flag or file, what is wrong and what to do."""

    #: Whether another process of the machine prints the line.
    silent = False


class UsageError(InputError):
    """A flag, or a file or folder that a flag names, can't be used."""


class DataError(InputError):
    """A picture, label, list or class table of a data set can't be used."""


class CheckpointError(InputError):
    """A checkpoint can't be used."""


class RunError(RuntimeError):
    """A failure that is no fault of the input, exit status 1: one line with what happened and what to do."""

    silent = False
