"""Self-distillation: a converted model learns from the original, which is the same weights before the conversion.

    from farskip_fx.distill import DistillConfig, distill
    distill(model, dataset, DistillConfig(teacher="copy"), args=TrainingArguments("run", ...))

`refit` repairs the weights in closed form before any training step.
"""
from .cache import CachedTeacher
from .config import DistillConfig
from .evaluation import Evaluation, assert_rewired, evaluate, print_table, table, token_bytes
from .head import check_head, head_of, hidden_states
from .loss import Dense, Head, Sums, TopK, distillation_loss
from .refit import RefitReport, refit
from .teacher import Teacher, make_teacher
from .trainer import DistillTrainer, distill, last_checkpoint

__all__ = [
    "CachedTeacher", "Dense", "DistillConfig", "DistillTrainer", "Evaluation", "Head", "RefitReport", "Sums",
    "Teacher", "TopK",
    "assert_rewired", "check_head", "distill", "distillation_loss", "evaluate", "head_of", "hidden_states",
    "last_checkpoint", "make_teacher", "print_table", "refit", "table", "token_bytes",
]
