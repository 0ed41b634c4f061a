"""Self-distillation: a converted model learns from the original, which is the same weights before the conversion.

    from farskip_fx.distill import DistillConfig, distill
    distill(model, dataset, DistillConfig(teacher="copy"), args=TrainingArguments("run", ...))

`refit` repairs the weights in closed form before any training step.
"""
from .cache import CachedTeacher
from .choice import Choice, choose, hidden_time
from .config import DistillConfig
from .evaluation import Evaluation, assert_rewired, evaluate, print_table, table, token_bytes
from .exposed import Deployment, HiddenTime
from .front import front_svg
from .head import check_head, head_of, hidden_states
from .loss import Dense, Head, Sums, TopK, distillation_loss
from .refit import RefitReport, refit
from .sensitivity import Sensitivity, sensitivity
from .tasks import lm_eval, lm_eval_task
from .teacher import Teacher, make_teacher
from .trainer import DistillTrainer, distill, last_checkpoint

__all__ = [
    "CachedTeacher", "Choice", "Dense", "Deployment", "DistillConfig", "DistillTrainer", "Evaluation", "Head", "HiddenTime",
    "RefitReport", "Sensitivity", "Sums", "Teacher", "TopK",
    "assert_rewired", "check_head", "choose", "distill", "distillation_loss", "evaluate", "front_svg", "head_of",
    "hidden_states", "hidden_time",
    "last_checkpoint", "lm_eval", "lm_eval_task", "make_teacher", "print_table", "refit", "sensitivity", "table", "token_bytes",
]
