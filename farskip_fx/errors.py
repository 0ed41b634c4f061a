"""What can go wrong, as types. Every message names the layer or node and the next step."""
from __future__ import annotations


class FarskipError(RuntimeError):
    """Base of every error of this package."""


class ConfigError(FarskipError, ValueError):
    """An option is unknown, has a bad value, or disagrees with the checkpoint."""


class NoMoEError(FarskipError):
    """The compiled graph has no residual stream with MoE blocks."""


class RefusedError(FarskipError):
    """A requested layer (or the whole stream) cannot be rewired."""


class SplitModelError(FarskipError):
    """A graph break left only a part of the decoder layers in one graph."""


class WrongConnectivityError(FarskipError):
    """A converted model would run with its original connectivity."""


class GradientError(FarskipError):
    """A gradient that data parallelism would not average."""


class CheckpointError(FarskipError):
    """A checkpoint is incomplete, damaged or of another model, or another rank could not write or read it."""


class CollectiveError(FarskipError):
    """A rank does not answer, has failed, or takes part in another collective than this one."""


class FarskipWarning(UserWarning):
    """``strict=False``: something that was asked for was left unchanged."""
