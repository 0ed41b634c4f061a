"""A converted model gets its accuracy back: a small MoE language model, trained here, converted, repaired, distilled.

    python examples/distill_tiny.py                                     # all of it with a small teacher: under 10 minutes
    python examples/distill_tiny.py --train-teacher teacher/            # a good teacher, once; about an hour on one core
    python examples/distill_tiny.py --teacher teacher/ --share 0.05 0.2 # refit, then KL on 5 % and on 20 % of the teacher's tokens
    python examples/distill_tiny.py --train-teacher new/ --scratch farskip      # the same training with another connectivity

On a GPU where there is one. The teacher is Qwen3-MoE (or, with --family deepseek_v3, a DeepSeek-V3 with latent attention and a
shared expert) of 8 layers and 3.6 M parameters over the bytes of Python's own standard library. Training saves as it goes; the
same command goes on where it was stopped.
"""
import argparse
import copy
import json
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig, TrainingArguments

import farskip_fx as fs
from farskip_fx.distill import choose, distill, evaluate, hidden_time, make_teacher, print_table, refit, sensitivity

SEQUENCE, BATCH = 256, 16
LEARNING_RATE, WARM_UP = 2e-3, 100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_COMMON = dict(vocab_size=256, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, moe_intermediate_size=128,
               num_experts_per_tok=2, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
               eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(num_key_value_heads=2, head_dim=32, intermediate_size=256, num_experts=8,
                                        norm_topk_prob=True, router_aux_loss_coef=0.01, **_COMMON),
    "deepseek_v3": lambda: DeepseekV3Config(num_key_value_heads=4, intermediate_size=384, n_routed_experts=8,
                                            n_shared_experts=1, n_group=2, topk_group=2, first_k_dense_replace=1,
                                            q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32,
                                            v_head_dim=32, **_COMMON),
}


def new_model(family: str = "qwen3_moe", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    return model.to(DEVICE)


def load_model(path: str | Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    model.set_experts_implementation("grouped_mm")
    return model.to(DEVICE)


# --- text ---------------------------------------------------------------------------------------------------------

def standard_library() -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) bytes, uint8: the .py files of this Python without its tests; every 20th file is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    parts = [b"".join(path.read_bytes() for i, path in enumerate(files) if (i % 20 == 10) is held) for held in (False, True)]
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def draw(text: torch.Tensor, seed: int, size: int = BATCH) -> torch.Tensor:
    """A batch of token ids [size, SEQUENCE]; the same seed gives the same batch, whatever was drawn before."""
    starts = torch.randint(0, len(text) - SEQUENCE, (size,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[s:s + SEQUENCE] for s in starts]).long()


def held_out_batches(text: torch.Tensor, sequences: int = 256) -> list[torch.Tensor]:
    """Evenly spaced sequences of the held-out text, as batches."""
    starts = torch.linspace(0, len(text) - SEQUENCE - 1, sequences).long()
    return list(torch.stack([text[s:s + SEQUENCE] for s in starts]).long().to(DEVICE).split(BATCH))


@torch.no_grad()
def measure(model: nn.Module, batches: list[torch.Tensor]) -> tuple[float, float]:
    """(loss in nats a byte, next-token accuracy in percent)."""
    loss = hits = count = 0
    for ids in batches:
        logits, target = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        loss += F.cross_entropy(logits, target, reduction="sum").item()
        hits += (logits.argmax(-1) == target).sum().item()
        count += target.numel()
    return loss / count, 100 * hits / count


# --- the teacher --------------------------------------------------------------------------------------------------

def train_teacher(path: Path, *, family: str = "qwen3_moe", steps: int = 2200, seed: int = 0, save_every: int = 200,
                  scratch: str = "none") -> None:
    """AdamW, cosine to zero, BATCH x SEQUENCE bytes a step; the model goes to ``path`` as safetensors. ``scratch``: the
    connectivity that it is trained with."""
    path.mkdir(parents=True, exist_ok=True)
    text, held_out = standard_library()
    model, held_out = new_model(family, seed).train(), held_out_batches(held_out, 64)
    if scratch != "none":
        fs.apply(model, connectivity=scratch, inner="eager")
    weights = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1},
                                   {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                  lr=LEARNING_RATE, betas=(0.9, 0.95))
    state, first, seconds = path / "training.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        of = (saved["family"], saved["steps"], saved["seed"], saved.get("scratch", "none"))
        if of != (family, steps, seed, scratch):
            raise SystemExit(f"{state} is of another run ({of[0]}, {of[1]} steps, seed {of[2]}, {of[3]}); choose another folder")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
    aux = {"output_router_logits": True} if family == "qwen3_moe" else {}
    began = time.perf_counter() - seconds
    for step in range(first, steps):
        rate = LEARNING_RATE * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = draw(text, seed * 1_000_003 + step).to(DEVICE)
        loss = model(input_ids=ids, labels=ids, use_cache=False, **aux).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % save_every and step + 1 < steps:
            continue
        model.eval()
        quality = measure(model, held_out)
        seconds = time.perf_counter() - began
        print(f"step {step + 1:5d}  held-out loss {quality[0]:.4f}  accuracy {quality[1]:.2f} %  {seconds:.0f} s",
              flush=True)
        model.save_pretrained(path)
        model.train()
        saved = dict(family=family, steps=steps, seed=seed, scratch=scratch, step=step + 1, seconds=seconds,
                     model=model.state_dict(), optimizer=optimizer.state_dict())
        torch.save(saved, path / "training.pt.new")
        os.replace(path / "training.pt.new", state)      # a run that is stopped while it saves goes on from the save before


# --- conversion, refit, distillation ------------------------------------------------------------------------------

class Rows(torch.utils.data.Dataset):
    """``count`` rows of training text that the teacher has not seen in these places."""

    def __init__(self, text: torch.Tensor, count: int, seed: int) -> None:
        self.text, self.count, self.seed = text, count, 20_000_000 * (seed + 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": draw(self.text, self.seed + index, 1)[0]}


def recover(path: Path, *, shares: list[float], batches: int, loss: str, connectivity: str, layers: str, batch: int, rate: float,
            seed: int, inner: str, optimizer: str, hidden: float) -> dict:
    """Original, converted, refitted (``batches`` > 0), and the refitted one distilled on each of ``shares`` of the teacher's
    tokens; a table of all."""
    text, held_out = standard_library()
    held_out = [{"input_ids": ids} for ids in held_out_batches(held_out)]
    model, rows, seconds, options = load_model(path), {}, {}, dict(connectivity=connectivity, layers=layers)
    if layers.startswith("auto:"):      # the best accuracy that keeps so much of the hidden time
        found = sensitivity(model, [draw(text, 9_000_000 + i) for i in range(2)])
        choice = choose(found, hidden_time(found), share=float(layers.removeprefix("auto:")))
        print(f"{choice.share:.0%} of the hidden time (predicted): {choice.connectivity}")
        options = dict(connectivity=choice.connectivity)
    original = copy.deepcopy(model)
    teacher = make_teacher("copy", original)

    def row(name: str, model: nn.Module) -> None:
        rows[name] = evaluate(model, held_out, teacher=teacher, bytes_a_token=1.0)

    def converted(name: str) -> None:
        fs.apply(model, **options, inner="eager")
        row(name, model)
        fs.remove(model)

    row("original", model)
    converted("converted")
    if batches:
        began = time.perf_counter()
        print(refit(model, [draw(text, 10_000_000 + seed * 1_000 + i).to(DEVICE) for i in range(batches)], **options))
        seconds["refitted"] = time.perf_counter() - began
        converted("refitted")
    for share in filter(None, shares):
        student, steps = copy.deepcopy(model), round(share * teacher_tokens(path) / (batch * SEQUENCE))
        weights = {"kl": dict(kl=1.0), "ce": dict(kl=0.0, cross_entropy=1.0)}[loss]
        began, name = time.perf_counter(), f"{loss.upper()} on {share:.0%}"
        distill(student, Rows(text, steps * batch, seed), **options, **weights, inner=inner, teacher_model=original,
                optimizer=optimizer, hidden=hidden if loss == "kl" else 0.0,
                args=TrainingArguments("build/distill_tiny", max_steps=steps, per_device_train_batch_size=batch,
                                       learning_rate=rate, lr_scheduler_type="linear", warmup_steps=max(1, steps // 20),
                                       adam_beta2=0.98, save_strategy="no", report_to="none", seed=seed, logging_steps=50))
        seconds[name] = time.perf_counter() - began
        row(name, student)
        print(f"{name} of the teacher's tokens: {steps * batch * SEQUENCE / 1e6:.2f} M, {seconds[name]:.0f} s")
    print_table(rows, Console(width=110))
    loss_of = [r.loss for r in rows.values()]
    if batches:
        print(f"the refit removed {(loss_of[1] - loss_of[2]) / (loss_of[1] - loss_of[0]):.1%} of the loss that the conversion added")
    return {name: {"bits_per_byte": r.bits_per_byte, "accuracy": r.accuracy, "kl": r.kl, "agreement": r.agreement}
            for name, r in rows.items()} | {"seconds": seconds}


def teacher_tokens(path: Path) -> int:
    state = torch.load(path / "training.pt", weights_only=True, mmap=True)
    return state["step"] * BATCH * SEQUENCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-teacher", type=Path, metavar="FOLDER", help="train the teacher (or go on), and save it")
    parser.add_argument("--family", choices=sorted(CONFIGS), default="qwen3_moe")
    parser.add_argument("--steps", type=int, default=2200, help="of the teacher's training (2200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", default="none", metavar="NAME",
                        help="with --train-teacher: the connectivity from the first step on (none)")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="convert this teacher, repair it, measure each")
    parser.add_argument("--batches", type=int, default=12, help=f"of {BATCH} sequences for the refit; 0: no refit (12)")
    parser.add_argument("--share", type=float, nargs="+", default=[0.2],
                        help="of the teacher's tokens, for a distillation each; 0: none (0.2)")
    parser.add_argument("--loss", choices=("kl", "ce"), default="kl", help="ce: plain training, for comparison (kl)")
    parser.add_argument("--connectivity", default="farskip", help="of all converted layers (farskip)")
    parser.add_argument("--layers", default="all", help='"all", "last:0.5", "auto:0.9", ... (all)')
    parser.add_argument("--batch", type=int, default=4, help="sequences a step of the distillation (4)")
    parser.add_argument("--rate", type=float, default=1e-3, help="its learning rate (1e-3)")
    parser.add_argument("--optimizer", choices=("muon", ""), default="muon", help='"": AdamW, which wants --rate 5e-4 (muon)')
    parser.add_argument("--hidden", type=float, default=10.0, help="weight of the states between layers, falling to 0 (10)")
    parser.add_argument("--inner", choices=("inductor", "eager"), default="eager", help="what runs the student in training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if arguments.train_teacher:
        train_teacher(arguments.train_teacher, family=arguments.family, steps=arguments.steps, seed=arguments.seed,
                      scratch=arguments.scratch)
        return
    if not arguments.teacher:
        arguments.teacher = Path("build/small_teacher")
        train_teacher(arguments.teacher, family=arguments.family, steps=250, seed=arguments.seed, save_every=50)
    figures = recover(arguments.teacher, shares=arguments.share, batches=arguments.batches, loss=arguments.loss,
                      connectivity=arguments.connectivity, layers=arguments.layers, batch=arguments.batch, rate=arguments.rate,
                      seed=arguments.seed, inner=arguments.inner, optimizer=arguments.optimizer, hidden=arguments.hidden)
    if arguments.json:
        arguments.json.write_text(json.dumps({**{k: str(v) for k, v in vars(arguments).items()}, "rows": figures}, indent=1))


if __name__ == "__main__":
    main()
