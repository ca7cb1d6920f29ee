"""From scores to the paper's figures: sweeps of runs, claims and verdicts, tables, plots.

Recipes and scores come in; figures, tables and verdicts go out. Only sweeps.py
and movement.py import torch. The look of a figure or table may be changed here without a change
elsewhere; the names that notebooks use are those of `claims` and `plots`.
"""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["claims", "plots", "tables"])
