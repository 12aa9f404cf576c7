"""The error a user can do something about."""


class TrainError(ValueError):
    """One line that names what is wrong, where, and the remedy. Scripts print it without a traceback."""


class TransientError(TrainError):
    """One that a restart from the last checkpoint may mend: a lost rank, ranks that disagree."""


class PeerLostError(TransientError):
    """Another rank ended or hangs; why is its own to tell."""


class RepeatedCrashError(TrainError):
    """A run ended twice in the same step in the same way."""
