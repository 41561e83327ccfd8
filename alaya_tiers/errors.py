"""Every error a user can meet, in one tree.

AlayaError
├── ConfigError (ValueError)            a setting makes no sense; nothing was opened or changed
│   ├── BudgetTooSmall                  a tier cannot hold even the working set; names the smallest budget that works
│   └── OtherMachine                    a profile was measured on another machine than this
├── InputError (ValueError)             the call's tensors do not fit the session; the session is unchanged
│   └── ContextTooLong                  more tokens than the model has positions; nothing was appended
├── TraceError (ValueError)             a request trace cannot be read; names the file and the line
├── UnsupportedModel (NotImplementedError)   the model's attention would come out wrong; refused before it runs
├── ModelChanged (RuntimeError)         the cache was filled by a model with other weights; nothing was run
├── StaleHandle (RuntimeError)          keys or values of an earlier step were used after the cache moved on
├── SessionClosed (RuntimeError)        the session was closed, or used in a forked process
├── KernelMissing (ImportError)         the compiled kernel is not there, or of other sources: install again (kernel.py)
├── DeviceError (RuntimeError)          the GPU would not do what the device tier needs; says what to change
└── StoreError (OSError)                the directory on disk; what was stored before stays readable
    ├── StoreUnwritable (PermissionError)    the directory cannot be created or written
    ├── StoreLocked                     another process has the store open for writing
    ├── StoreReadOnly                   this opening only reads; nothing was written
    ├── StoreFormat                     not a store, or written by a newer version
    ├── StoreMismatch                   written for another model or layout; names what differs
    ├── StoreCorrupt                    a block is missing or its digest is wrong; it was not used
    ├── OutOfSpace                      the disk or the ssd budget is full; blocks in memory stay, free space and go on
    │   └── WriteBudgetSpent            today's bytes are written; blocks in memory stay, raise it or wait for tomorrow
    └── IOFailed                        the operating system refused a read or write; errno and path are kept
"""


class AlayaError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(AlayaError, ValueError):
    """A setting makes no sense; nothing was opened or changed."""


class BudgetTooSmall(ConfigError):
    """A tier's byte budget is below the working set.

    Attributes: tier (name), budget (bytes given), smallest (bytes that work for this model and batch).
    """

    def __init__(self, tier: str, budget: int, smallest: int, why: str) -> None:
        self.tier, self.budget, self.smallest = tier, budget, smallest
        super().__init__(
            f"the {tier} budget of {budget:,} bytes is too small: {why}. "
            f"Give {tier}_budget={smallest} or more, or a smaller block_tokens."
        )


class OtherMachine(ConfigError):
    """A profile was measured on another machine than this; nothing was reckoned with it."""


class InputError(AlayaError, ValueError):
    """The call's tensors do not fit the session; the session is unchanged."""


class ContextTooLong(InputError):
    """More tokens than the model has positions; nothing was appended."""


class TraceError(AlayaError, ValueError):
    """A request trace is malformed, truncated, out of order or empty.

    Attributes: path, line (of the file; None when the file as a whole is meant).
    """

    def __init__(self, path: str, line: int | None, problem: str) -> None:
        self.path, self.line = path, line
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {problem}")


class UnsupportedModel(AlayaError, NotImplementedError):
    """The model's attention would come out wrong with this cache; refused before it runs."""


class ModelChanged(AlayaError, RuntimeError):
    """The cache was filled by a model with other weights, or by this one before they changed; nothing was run."""


class DeviceError(AlayaError, RuntimeError):
    """The GPU would not do what the device tier needs; nothing was opened."""


class StaleHandle(AlayaError, RuntimeError):
    """Keys or values of an earlier step were used after the cache moved on."""


class SessionClosed(AlayaError, RuntimeError):
    """The session was closed, or is used in a process forked from its own."""


class StoreError(AlayaError, OSError):
    """The directory on disk; what was stored before stays readable."""


class StoreUnwritable(StoreError, PermissionError):
    """The directory cannot be created or written."""


class StoreLocked(StoreError):
    """Another process has the store open for writing."""


class StoreReadOnly(StoreError):
    """The store was opened for reading, and this call writes; nothing was written."""


class StoreFormat(StoreError):
    """Not a store, or one written by a newer version."""


class StoreMismatch(StoreError):
    """Written for another model or layout; the message names what differs."""


class StoreCorrupt(StoreError):
    """A block is missing or its digest is wrong; it was not used.

    Attributes: segment (its name) and contexts (ids of all that need it), where what is damaged was stored; layer, head
    and block (its number in the segment), where it is a block. None or () otherwise.
    """

    contexts: tuple[str, ...] = ()
    segment: str | None = None
    layer: int | None = None
    head: int | None = None
    block: int | None = None


class CorruptWarning(UserWarning):
    """Something stored is damaged and was not used; see ``on_corrupt`` in Settings."""


class OutOfSpace(StoreError):
    """The disk or the ssd budget is full.

    Blocks in memory stay where they are and the session stays usable at the length it had before the
    failed step: free some space and repeat the step.
    """


class WriteBudgetSpent(OutOfSpace):
    """As many bytes were written today as ``write_budget`` allows; blocks in memory stay and nothing stored is lost."""


class IOFailed(StoreError):
    """The operating system refused a read or write; ``errno`` and ``filename`` are kept."""
