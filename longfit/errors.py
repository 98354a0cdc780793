"""The errors longfit raises: each says what was given, what is wrong and what would work."""


class LongfitError(Exception):
    """Base of every error that a user of longfit can cause; the command line turns it into exit code 2."""


class BudgetError(LongfitError, ValueError):
    """A memory budget that cannot be read or cannot be met."""


class BudgetExceededError(LongfitError, RuntimeError):
    """The cache held more than its budget: a defect of a method or of longfit, never ignored."""


class UnsupportedModelError(LongfitError, ValueError):
    """A model, a layer type or an attention backend that longfit cannot wrap correctly."""


class UnknownNameError(LongfitError, ValueError):
    """A compressor, task or recipe name that is not registered; the message suggests the nearest."""


class InputError(LongfitError, ValueError):
    """An input that cannot be used: empty, wrongly padded, not text, wrong shape."""


class UnsupportedFeatureError(LongfitError, NotImplementedError):
    """A call that is valid for a plain model but that the chosen method cannot do."""


class OffloadError(LongfitError, OSError):
    """The slow tier of a cache cannot be written: no such folder, no right to write there, or a full disk."""


class MissingPackageError(LongfitError, ImportError):
    """A package of an optional extra that is not installed; the message says what to install."""


class ScoreError(LongfitError, RuntimeError):
    """A compressor produced scores that are not usable (NaN, wrong shape) or selected wrongly."""


class LoadError(LongfitError, RuntimeError):
    """A model could not be found, downloaded, verified or converted."""


class FingerprintError(LongfitError, ValueError):
    """A memory that belongs to another model, tokenizer, adapter or method."""


class MemoryFileError(LongfitError, ValueError):
    """A saved memory that is missing, of another version, cut off or changed."""


class DataError(LongfitError, ValueError):
    """An evaluation's data file that is missing or broken; the message says which, where it comes from, its format."""


class OverlapError(DataError):
    """Documents that are both trained on and evaluated."""


class PrecisionWarning(UserWarning):
    """Not an error: numbers of a kind in which the result may be wrong without a sign of it."""


class TrainingError(LongfitError, RuntimeError):
    """Training cannot go on: a loss that is no number, a damaged checkpoint, a frozen weight that moved."""
