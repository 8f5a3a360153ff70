"""From files to batches: code, not clips (data sets live outside the repository)."""


class DataError(Exception):
    """One sentence for the user: what is wrong, where, and what to do."""


class MediaError(DataError):
    """A media file gives neither picture nor sound."""


class ManifestError(DataError):
    """A list of clips cannot be used."""


class RecordError(DataError):
    """A prepared data set is missing or damaged."""


class ConfigError(DataError):
    """A field of `config.data` does not fit the data set."""
