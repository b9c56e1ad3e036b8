"""Errors that a user can act on: one line that says what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LaminaError(Exception):
    """Something the user can mend.

    `what` says what is wrong, `where` names the file, site or option, `hint` says what to do.
    The command line prints `str(error)` and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where)
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return " ".join((f"{line} ({self.hint})" if self.hint else line).split())


class InputError(LaminaError):
    """A file, a document, an option or a text that lamina can't use."""


class CertificateError(LaminaError):
    """The anatomy that was found does not reproduce what the model computes."""


class UnsupportedError(LaminaError):
    """The request is understood, but this model, site or engine can't take it."""


class ReloadError(LaminaError):
    """The checkpoint does not behave, in a fresh process, as the model in memory does."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known words, or lists all where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return ("known: " + ", ".join(names)) if names else "none is known"
