"""``export_ours.py MODEL OUT FORMAT:QUANTISATION``: one export, as a fresh process does it."""

import sys
from pathlib import Path

from edgestill.export import export
from edgestill.recipe import ExportConfig

export(Path(sys.argv[1]), Path(sys.argv[2]), ExportConfig(to=sys.argv[3]))
