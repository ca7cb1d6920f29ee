"""Tools around the notebooks: run, clean and publish them; widgets, report, doctor and export.

In come notebooks, finished runs and their scores; out go executed notebooks, pages, cards and
folders for other programs. Nothing on the way from a sample to a score needs this room, so anything
here can be changed without looking elsewhere.
"""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["exploration", "lab", "widgets"])
