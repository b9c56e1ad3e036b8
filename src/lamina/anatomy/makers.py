"""Which linear maps of an attention make its queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lamina.anatomy.anatomy import Anatomy
from lamina.anatomy.projections import projections
from lamina.core.errors import UnsupportedError
from lamina.core.sites import Site


@dataclass(frozen=True, kw_only=True)
class Makers:
    """The sites of the maps that make queries, keys and values, the same one where it makes several.

    `group` heads share keys and values.
    """

    query: str
    key: str
    value: str
    group: int

    @property
    def apart(self) -> bool:
        """Whether three maps make the three."""
        return len({self.query, self.key, self.value}) == 3


def makers(anatomy: Anatomy, site: Site | str) -> Makers | None:
    """The maps of an attention, by the rows that its projections are; None where these can't be told."""
    try:
        seen = projections(anatomy, site)
    except UnsupportedError:
        return None
    found = [_owner(anatomy, site, rows.flatten(0, -2)) for rows in (seen.q, seen.k, seen.v)]
    if not all(found):
        return None
    query, key, value = found
    return Makers(query=query, key=key, value=value, group=seen.group)


def _owner(anatomy: Anatomy, sublayer: Site | str, rows: Tensor) -> str:
    """The linear map of a sublayer that has the first and the last of these rows [n, inputs]; '' where none has."""
    for site in anatomy.linears(sublayer):
        weight = anatomy.weight(site).detach().float()
        if weight.shape[1] == rows.shape[1] and all(bool((weight == r).all(1).any()) for r in (rows[0], rows[-1])):
            return site.id
    return ""
