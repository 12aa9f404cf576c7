"""The error a user can do something about."""


class ModelError(ValueError):
    """One line that names what is wrong, where, and the remedy. Scripts print it without a traceback."""
