"""``import_ours.py``: what the process of an export holds before it opens a model."""

import edgestill.export.writer
import edgestill.recipe  # noqa: F401
