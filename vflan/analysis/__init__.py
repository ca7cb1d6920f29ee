"""From scores to the paper's figures: sweeps of runs, the paper's claims and their verdicts, tables and plots.

Comes in: recipes and scores. Goes out: figures and verdicts. Only sweeps.py needs torch.
"""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["claims", "plots"])
