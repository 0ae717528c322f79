"""One file for each architecture: its docstring is the equation and the paper, its `loss` the formula. All
files here are found by name."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
