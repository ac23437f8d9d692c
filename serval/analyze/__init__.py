"""Looking into models: attention sinks, outliers, and what to do about them.

    result = run(InspectOptions("assets/serval-tiny"))
    print(result.verdict, result.sink_rate)

`attention.py` has the memory that observes and changes attention, `metrics.py` and `hidden.py` the
numbers, `interpret.py` the tests behind them, `redistribute.py` and `preserve.py` the uses.
"""

from serval.analyze import report
from serval.analyze.inspection import Inspection, InspectOptions, run

__all__ = ["InspectOptions", "Inspection", "report", "run"]
