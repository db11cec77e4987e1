"""What the user can mend: one base class, so that every command tells it in one line that begins with `error:`.

A message holds the file, row or key, the offending value, what is allowed, and the cure. Everything else that is
raised is a fault of ShortZip's own and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A file, value or setting that the user can mend; the message says how."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is not there."""

    __str__ = Exception.__str__


class FileInTheWay(UserError, FileExistsError):
    """A file or folder that is already there and is not replaced unasked."""

    __str__ = Exception.__str__


class CannotWrite(UserError, OSError):
    """A disk that is full or read-only, or a folder without the right to write."""

    __str__ = Exception.__str__


class MissingExtra(UserError, ImportError):
    """A package that an extra of ShortZip installs and that is not there; the message names the extra."""

    __str__ = Exception.__str__


class Busy(UserError):
    """A folder in which another process is at work."""


class ToldElsewhere(UserError):
    """What another process tells the user: this one ends without a word."""
