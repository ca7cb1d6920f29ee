"""From a run to scores: answers are generated, cached, judged where a benchmark needs a judge, and scored.

Comes in: a run folder and benchmark folders. Goes out: a table of scores. A new benchmark is one file in benchmarks/.
"""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["judge", "stats"])
