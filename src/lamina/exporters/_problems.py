"""What an exporter can't do, said before it is tried."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.core.errors import UnsupportedError


@dataclass(frozen=True)
class Problem:
    """`where` names the site, parameter or option, `what` the reason, `hint` what to do."""

    where: str
    what: str
    hint: str = ""

    def error(self) -> UnsupportedError:
        """The problem as an error."""
        return UnsupportedError(self.what, where=self.where, hint=self.hint)
