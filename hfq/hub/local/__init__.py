"""A Hub on this machine, which `huggingface_hub`, `transformers` and `datasets` take for the real one.

It answers what those clients ask when they publish, read and load models and datasets, and 404 to the rest.
It is for one machine and its user: plain HTTP on loopback, no web pages, no git, no xet storage.
"""

from .server import LocalHub

__all__ = ["LocalHub"]
