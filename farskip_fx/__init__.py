"""farskip_fx: FarSkip connectivity for Mixture-of-Experts models, as a torch.compile graph transformation."""
from .agreement import check_agreement
from .backend import farskip_backend
from .calibrate import calibrate
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import FarskipConfig
from .connectivity import register_connectivity
from .convert import apply, farskip, remove
from .data_parallel import DataParallel, clip_grad_norm_, data_parallel, no_sync, reduce_gradients
from .diagnose.bisect import Bisection, bisect
from .diagnose.explain import explain
from .diagnose.profiling import Profile, profile
from .dumps import dump_graphs
from .errors import (CheckpointError, CollectiveError, ConfigError, FarskipError, FarskipWarning, GradientError, NoMoEError,
                     RefusedError, SplitModelError, WrongConnectivityError)
# Importing it registers the exchanges, and `ep_implementation="farskip"`, with transformers.
from .expert_parallel import expert_parallel, expert_parameters, full_state_dict, gather_experts, load_full_state_dict
from .guard import guarded
from .kernels import profile_kernels
from .passes.costs import Rates
from .pretrained import from_pretrained
from .report import Report, last_reports
from .verify import Verification, verify

__all__ = [
    "Bisection", "CheckpointError", "CollectiveError", "ConfigError", "DataParallel", "FarskipConfig", "FarskipError",
    "FarskipWarning", "GradientError", "NoMoEError", "Profile", "Rates", "RefusedError", "Report", "SplitModelError",
    "Verification", "WrongConnectivityError", "apply", "bisect", "calibrate", "check_agreement", "clip_grad_norm_",
    "data_parallel", "dump_graphs", "expert_parallel", "expert_parameters", "explain", "farskip", "farskip_backend",
    "from_pretrained", "full_state_dict", "gather_experts", "guarded", "last_reports", "latest_checkpoint",
    "load_checkpoint", "load_full_state_dict", "no_sync", "profile", "profile_kernels", "reduce_gradients", "register_connectivity",
    "remove", "save_checkpoint", "verify",
]
