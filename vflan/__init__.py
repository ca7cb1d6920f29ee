"""Vision-Flan and its two-stage visual instruction tuning (Xu et al., 2024).

The public names are listed in `__init__.pyi`, where editors find them. Each is imported on first
use, so that `import vflan` takes milliseconds and the figures need no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
