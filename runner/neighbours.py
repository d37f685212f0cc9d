"""Refuse a folder of the user's own that hides our package `envs`, as one beside a copied script does."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.find_spec("envs")
_home = Path(__file__).resolve().parents[1]
if _spec is None or _spec.origin is None or Path(_spec.origin).resolve().parents[1] != _home:
    _found = "nothing, it is not installed" if _spec is None else next(iter(_spec.submodule_search_locations or ["?"]))
    sys.exit(f"udg-jax's package `envs` is hidden by {_found}: rename that folder, or move the script to another one")
