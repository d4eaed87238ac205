"""Prediction of decode speed, judged on published speeds that it was not fitted on. Nothing is timed here."""

from __future__ import annotations

import numpy as np

from edgestill.bench.points import load_points
from edgestill.bench.predict_efficiency import Unseen, leave_one_device_out, leave_one_out

from ..context import Context
from ..registry import Taken, figure

_PEER = "published speeds (devices/points.csv, devices/anchors.csv)"
_KINDS = ("cpu", "gpu", "npu", "all")


@figure(
    "predict_loo", group="measure", title="decode prediction, leave-one-out mean error on the points given",
    unit="%", limit=8.0, peer=_PEER,
)  # fmt: skip
def predict_loo(context: Context, variant: str) -> Taken:
    """Fitted on the 22 points alone, since that is what the limit was set on."""
    points = load_points()
    given = [point for point in points if point.given]
    alone = np.abs(leave_one_out(given)) * 100
    helped = np.abs(leave_one_out(points, judged=given)) * 100
    kinds = [point.processor for point in given]
    by_kind = ", ".join(
        f"{kind} {np.mean([e for e, k in zip(alone, kinds, strict=True) if k == kind]):.1f} %"
        for kind in ("cpu", "gpu", "npu")
    )
    how = (
        f"{len(given)} points of 5 devices, fitted on the others of them: {by_kind}, worst {alone.max():.0f} %; "
        f"with {len(points) - len(given)} further anchors {helped.mean():.1f} %"
    )
    return Taken(float(alone.mean()), how)


@figure(
    "predict_lodo", group="measure", title="points of unseen devices inside the stated 90 % interval",
    unit="%", limit=85.0, sense="at_least", variants=_KINDS, peer=_PEER,
)  # fmt: skip
def predict_lodo(context: Context, variant: str) -> Taken:
    found = _unseen(context, variant)
    given = [one for one in found if one.point.given]
    whole = {one.point.device for one in found} - {one.point.device for one in found if not one.covered}
    devices = len({one.point.device for one in found})
    how = (
        f"{sum(one.covered for one in found)} of {len(found)} points of {devices} devices, each predicted by the "
        f"devices with another chip; all points of {len(whole)} devices; of the points given "
        f"{sum(one.covered for one in given)} of {len(given)}; mean error "
        f"{np.mean([abs(one.error) for one in found]):.1%}; widest interval {max(one.ends for one in found):.2f}x"
    )
    return Taken(100 * float(np.mean([one.covered for one in found])), how)


@figure(
    "predict_lodo_width", group="measure", title="widest 90 % interval of an unseen device, high end over low end",
    unit="x", limit=2.5, variants=_KINDS, peer=_PEER,
)  # fmt: skip
def predict_lodo_width(context: Context, variant: str) -> Taken:
    found = _unseen(context, variant)
    ends = [one.ends for one in found]
    return Taken(float(max(ends)), f"{len(found)} points, narrowest {min(ends):.2f}x")


def _unseen(context: Context, variant: str) -> list[Unseen]:
    found = context.once("unseen devices", lambda: leave_one_device_out(load_points()))
    return [one for one in found if variant in ("all", one.point.processor)]
