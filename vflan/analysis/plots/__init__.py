"""The figures: one function for each of the paper's, and pictures of samples, answers and tokens.

Scores and samples come in, matplotlib figures go out; torch is never imported. Every comparison
shows intervals and, where the paper prints a number, that number as a grey mark. The mini world is
not the paper's world: the marks give a direction, not a target. `__init__.pyi` lists the names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
