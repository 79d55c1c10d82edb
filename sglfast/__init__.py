"""sglfast: the front door of a pool of SGLang workers. Imports nothing, so that each process loads only its own part."""

__version__ = "0.1.0"
