"""Refuse a folder of the user's own that hides our package `runner`, as one beside a copied script does.

`runner` says the same of `envs`; a script imports `envs` first.
"""

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]


def check_runner():
    """End the process with one line where the script that is running needs our `runner` and would get another."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or not Path(script).is_file() or b"runner.launch(" not in Path(script).read_bytes():
        return
    spec = importlib.util.find_spec("runner")
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parents[1] != HOME:
        found = "nothing: it is not installed" if spec is None else next(iter(spec.submodule_search_locations or ["?"]))
        sys.exit(f"udg-jax's package `runner` is hidden by {found}: rename that folder, or move the script elsewhere")
