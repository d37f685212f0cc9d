"""The error for what a user can cause and mend: one message, naming the fault and the remedy."""


class InputError(ValueError):
    """A file, flag, name or batch size that cannot be used; raised before any long work starts."""


def said(error: BaseException) -> str:
    """Return what an error of other code said, with its kind, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
