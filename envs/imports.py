"""Modules of the user's own, which a name on the command line or in a call asks for: `module:name`.

A name in a file never imports anything: whoever sends a file would choose what runs here.
"""

import importlib
import os
import sys

from envs.errors import InputError, said


def module_of(name: str) -> str:
    """Return the module that a name asks for: "gym:a.b:X-v0" and "a.b:x" -> "a.b"; "" where it asks for none."""
    module, colon, _ = name.removeprefix("gym:").rpartition(":")
    return module if colon else ""


def import_for(name: str) -> None:
    """Import the module that a name asks for, installed or in the working directory; InputError where that fails."""
    module = module_of(name)
    if not module or module in sys.modules:
        return
    here = os.getcwd()
    if here not in sys.path:  # a script's own folder is there, the one it is started from is not
        sys.path.append(here)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a user's module does
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            found = f"there is no module '{error.name}', neither installed nor in {here}"
        else:
            found = f"importing {module} ended with {said(error)}"
        raise InputError(f"'{name}': {found}") from None


def check_imported(name: str) -> None:
    """Refuse (InputError) a name, read from a file, whose module is not imported yet."""
    module = module_of(name)
    if module and module not in sys.modules:
        raise InputError(f"'{name}' is of the module '{module}', which no file may import")
