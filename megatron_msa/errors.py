"""The one error type for settings a user can correct."""


class ConfigError(ValueError):
    """A setting, file or checkpoint that cannot be used.

    The message names the value that was given, what is allowed, and what to change. The entry points print
    it without a traceback and exit with status 2, before any process group exists.
    """
