"""`docs/hooks.py` fills the generated parts of the pages. It is a script in their folder, not part of a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
