"""farskip_fx: FarSkip connectivity for Mixture-of-Experts models, as a torch.compile graph transformation."""
from .backend import farskip_backend
from .config import FarskipConfig
from .convert import apply, farskip, remove
from .errors import (ConfigError, FarskipError, FarskipWarning, NoMoEError, RefusedError, SplitModelError,
                     WrongConnectivityError)
from .report import Report, last_reports

__all__ = [
    "ConfigError", "FarskipConfig", "FarskipError", "FarskipWarning", "NoMoEError", "RefusedError", "Report",
    "SplitModelError", "WrongConnectivityError", "apply", "farskip", "farskip_backend", "last_reports", "remove",
]
