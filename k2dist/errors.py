"""Every error that k2dist raises on purpose. The message says whose fault it is and what to do.

K2Error
├── UsageError              the caller: bad command line or argument            (exit code 2)
│   ├── ConfigError         the cluster YAML or a model's config.json
│   ├── LayoutError         a layout that cannot work (cuts a scale block, more ranks than experts, ...)
│   └── RequestError        one request's prompt or sampling; the others go on
├── CheckpointError         the model directory: missing, extra, truncated or mis-shaped
├── FaultyRankError         one rank: its memory or its kernels do not give the right numbers
├── CapacityError           cannot be done here and now: a port in use, too few CPUs, a full queue
├── PeerError               a rank or process that this one waited for did not arrive in time
├── FencedError             this generation has ended; its step must be repeated in the next one
└── UnavailableError        the service is starting, draining or gone; a retry can help
"""


class K2Error(Exception):
    """Base of all errors raised on purpose; anything else that escapes is a bug."""

    retry_can_help = False


class UsageError(K2Error):
    """The caller asked for something that cannot be done as asked."""


class ConfigError(UsageError):
    """A configuration file is wrong; the message gives path, value and remedy, all faults at once."""


class LayoutError(UsageError):
    """A placement of ranks, experts or slices that cannot work; the message gives the arithmetic."""


class RequestError(UsageError):
    """One request is wrong. `field` names what to change, as the client spelled it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)  # both, so that it survives pickling
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class CheckpointError(K2Error):
    """The model directory is not what its config.json and index promise."""


class FaultyRankError(K2Error):
    """A rank does not hold or compute what it should; the message names rank, tensor or layer. Replace it."""


class CapacityError(K2Error):
    """Not enough of something now: CPUs, memory, pages, a free port, room in a queue."""

    retry_can_help = True


class PeerError(K2Error):
    """A peer did not arrive within a named deadline, or died. `ranks` are the late world ranks, if known."""

    retry_can_help = True

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message, ranks)
        self.message = message
        self.ranks = ranks

    def __str__(self) -> str:
        return self.message


class FencedError(K2Error):
    """The generation this work belongs to was ended by the supervisor."""

    retry_can_help = True


class UnavailableError(K2Error):
    """Not serving: starting, draining, or stopped."""

    retry_can_help = True
