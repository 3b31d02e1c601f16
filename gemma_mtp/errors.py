"""The errors a caller can meet. Each message is one sentence: what was wrong with what input, and what to do."""


class GemmaMtpError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(GemmaMtpError):
    """A checkpoint file or folder is missing, damaged or of a kind that is not supported."""


class PairError(GemmaMtpError):
    """A drafter does not belong to the target it was given with."""


class PromptError(GemmaMtpError):
    """A prompt cannot be used: empty, too long for the context, or with tokens outside the vocabulary."""


class SettingsError(GemmaMtpError):
    """A sampling or runtime setting is out of its range."""


class BusyError(GemmaMtpError):
    """There is no room for another request now: the queue is full, or the engine is closing."""


class LateError(GemmaMtpError):
    """A request took longer than requests may take."""
