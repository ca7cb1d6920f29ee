"""From a run to scores: answers are generated, cached, judged if a benchmark needs it, and scored.

In: a run folder and benchmark folders. Out: a table of scores. A new benchmark is one file in
benchmarks/; nothing else has to change.
"""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["judge", "stats"])
