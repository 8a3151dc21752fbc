"""The two ways a run ends badly; the command line turns them into exit status 2 and 1."""


class ConfigError(ValueError):
    """The configuration or an argument is wrong: the message names the field, the value and what to do."""


class RunError(RuntimeError):
    """The run failed for a reason outside the configuration: the message names the stage and what to do."""
