"""`serval quickstart`: evaluate, compress, evaluate again and serve one small model.

`VARIANTS` lists the ways the model is compressed and `MEASURES` what is shown of each; a new
compressor or cache layout is a line in the first, a new number a line in the second.
"""

from __future__ import annotations

from serval.quickstart.flow import QuickstartOptions, run
from serval.quickstart.measures import MEASURES
from serval.quickstart.variants import VARIANTS, Outcome, Variant

__all__ = ["MEASURES", "VARIANTS", "Outcome", "QuickstartOptions", "Variant", "run"]
