"""edgestill: distil a big model, bottle the student for phones and boards, and prove what is in each bottle."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
