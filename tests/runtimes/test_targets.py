"""A target is named by one word; what nobody knows is an error that says what there is."""

from __future__ import annotations

import importlib
import re

import pytest

from edgestill.errors import UsageError
from edgestill.runtimes.targets import SCHEMES, Target, open_target, parse_target


def test_host_is_this_machine() -> None:
    with open_target("host") as target:
        assert isinstance(target, Target)
        assert (target.name, target.source, target.facts()) == ("host", "measured", None)


@pytest.mark.parametrize("text", ["hots", "", "fax:123", "host:elsewhere"])
def test_an_unknown_target_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_target(text)
    assert "host" in caught.value.hint, caught.value.hint


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_each_scheme_names_a_class_that_exists(scheme: str) -> None:
    kind = SCHEMES[scheme]
    assert str(parse_target(re.split(r"[:\[]", kind.form)[0])) in (scheme, f"{scheme}://")
    if kind.opens:
        module, _, attribute = kind.opens.partition(":")
        assert hasattr(importlib.import_module(f"edgestill.runtimes.transports.{module}"), attribute)
