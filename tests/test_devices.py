"""``edgestill devices list`` shows every kind of target."""

from __future__ import annotations

from edgestill.devices import list_targets
from edgestill.runtimes.targets import SCHEMES


def test_all_kinds_are_listed() -> None:
    kinds = list_targets().kinds
    assert [kind.address for kind in kinds] == [kind.form for kind in SCHEMES.values()]
    assert all(kind.description for kind in kinds)
