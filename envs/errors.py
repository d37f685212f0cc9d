"""The error for what a user can cause and mend: one message, naming the fault and the remedy."""


class InputError(ValueError):
    """A file, flag, name or batch size that cannot be used; raised before any long work starts."""
