"""Errors that a user can cause. Each carries one sentence: what was wrong, what was found, what is allowed."""


class TrackedReplayError(Exception):
    """Base of every error that the command line prints as one sentence instead of a traceback."""


class ConfigError(TrackedReplayError, ValueError):
    """A parameter or config field is unknown, has the wrong type or a value outside what is allowed."""


class TaskError(TrackedReplayError):
    """A task's own code raised an exception, or gave back something of another form than promised."""


class DataError(TrackedReplayError):
    """A data set is missing, damaged or does not have the shape that the task promises."""


class RunError(TrackedReplayError):
    """A run that was named cannot be used: it does not exist, is of another stage, or has not finished."""


class RecordingError(TrackedReplayError):
    """A recorded file is missing, damaged or does not match its digest."""


class FetchError(RecordingError):
    """A file could not be fetched from its store, which may be otherwise in a minute."""


class ReplayError(TrackedReplayError):
    """The replay cannot be exact: a replayed state differs from the recorded one, or a layer has no adjoint."""


class RetrainingError(TrackedReplayError):
    """Retrainings failed twice, so that a stage has no result; the message holds what the first of them raised."""


class NumericalError(TrackedReplayError):
    """NaN or Inf appeared; the message names the step and the tensor."""
