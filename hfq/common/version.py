"""The version of this package, of its reports and of its cards."""

__version__ = "0.1.0"
