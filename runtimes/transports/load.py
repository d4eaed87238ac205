"""How much of a device *other* processes used while a worker ran there: what the kernel counted, without our workers.

The counterpart of :class:`edgestill.bench.environment.LoadProbe`, which looks at this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shell import RemoteShell, quote

__all__ = ["UNKNOWN", "LoadMeter", "Ticks", "load_between"]

_BUSY_FRACTION = 0.10
UNKNOWN = {
    "load_1m_before": None, "load_1m_after": None, "others_fraction": None, "steal_fraction": None, "busy": None,
}  # fmt: skip
"""What stands in a record when the device does not tell."""


@dataclass(frozen=True)
class Ticks:
    """Clock ticks of all processors since the device started: ``busy``, ``stolen`` by a hypervisor, ``total``; and
    what our workers used of ``busy`` since the meter was made."""

    busy: int
    stolen: int
    total: int
    ours: int


class LoadMeter:
    """Reads the kernel's counters through a shell. ``root`` is the store's folder: workers stand below ``exchange``.

    Workers may live side by side and end at different times, so what each has used is kept beyond its end.
    """

    def __init__(self, shell: RemoteShell, root: str) -> None:
        self._shell = shell
        self._root = root
        self._spent: dict[str, int] = {}

    def read(self) -> Ticks | None:
        """One reading; ``None`` where the device does not tell (some Androids let no shell read ``/proc/stat``)."""
        ran = self._shell.run(
            "head -n 1 /proc/stat 2>/dev/null || echo none\n"
            f"for f in {quote(self._root)}/exchange/*/pid {quote(self._root)}/exchange/*/host.pid; do\n"
            '  p=$(cat "$f" 2>/dev/null) || continue\n'
            '  echo "$f: $(sed "s/.*) //" /proc/$p/stat 2>/dev/null)"\ndone; true'
        )
        first, _, rest = ran.text.partition("\n")
        for line in rest.splitlines():
            path, _, numbers = line.rpartition("pid: ")  # of a worker, or of a second process that it started
            words = numbers.split()
            if len(words) > 14 and all(word.lstrip("-").isdigit() for word in words[11:15]):
                self._spent[path] = sum(int(word) for word in words[11:15])  # its own time and its children's
        words = first.split()[1:9]
        if not first.startswith("cpu ") or len(words) < 5 or not all(word.isdigit() for word in words):
            return None
        ticks = [int(word) for word in words] + [0] * (8 - len(words))
        idle, stolen = ticks[3] + ticks[4], ticks[7]
        return Ticks(sum(ticks) - idle - stolen, stolen, sum(ticks), sum(self._spent.values()))


def load_between(before: Ticks | None, after: Ticks | None) -> dict[str, Any]:
    """The keys of ``LoadProbe``: fractions of all processors, and whether that is busy; ``None`` where not known.

    >>> load_between(Ticks(100, 0, 1000, 0), Ticks(300, 0, 2000, 180))["others_fraction"]
    0.02
    """
    if before is None or after is None or after.total <= before.total:
        return dict(UNKNOWN)
    room = after.total - before.total
    others = max(0, after.busy - before.busy - (after.ours - before.ours)) / room
    stolen = max(0, after.stolen - before.stolen) / room
    return {
        **UNKNOWN,
        "others_fraction": round(min(others, 1.0), 4),
        "steal_fraction": round(min(stolen, 1.0), 4),
        "busy": others > _BUSY_FRACTION or stolen > _BUSY_FRACTION,
    }
