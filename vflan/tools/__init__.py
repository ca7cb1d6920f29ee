"""Around the notebooks: they are run, cleaned and published here; widgets, the report, the doctor, export to other formats.

Nothing on the way from a sample to a score needs this room.
"""

import lazy_loader

__getattr__, __dir__, _ = lazy_loader.attach(__name__, ["widgets"])
