"""What short runs have besides KL: the states between layers, and Muon."""
import copy

import pytest
import torch
from torch.nn import functional as F

from distill_cases import Texts, arguments, model_of
from farskip_fx.distill import distill
from farskip_fx.distill.muon import Muon, groups_of, orthogonal
from farskip_fx.distill.states import states_loss
from farskip_fx.errors import ConfigError


# --- states between layers ------------------------------------------------------------------------------------------

def test_states_against_a_loop():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 8, requires_grad=True) for _ in range(4)] for _ in range(2))
    targets = torch.tensor([[1, 2, -100], [3, -100, -100]])
    want = 0.0
    for own, aim in zip(student[1:], teacher[1:]):          # the first are embeddings
        for row, place in ((0, 0), (0, 1), (1, 0)):
            y = aim[row, place].double()
            want += ((own[row, place].double() - y) ** 2).sum() / (y ** 2).sum() / 3
    assert states_loss(student, teacher, targets).item() == pytest.approx(want.item() / 3)
    assert states_loss(student, teacher, targets, items=6.0).item() == pytest.approx(want.item() / 6)
    lost = [one.detach().clone() for one in student]
    for one in lost:
        one[targets == -100] = float("nan")         # of padding, say
        one.requires_grad_()
    states_loss(lost, teacher, targets).backward()
    assert all(one.grad[targets == -100].eq(0).all() and one.grad.isfinite().all() for one in lost[1:])
    for wrong in (None, (), teacher[:-1]):
        with pytest.raises(ConfigError, match="hidden wants the states after each layer"):
            states_loss(student, wrong, targets)


def test_states_in_a_run(tmp_path):
    """On top of the KL, falling to zero; one batch or four micro-batches are the same, and lowered graphs."""
    found, one, four = {}, dict(per_device_train_batch_size=8), dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, hidden, inner, sizes in (("without", 0.0, "eager", one), ("with", 0.5, "eager", one), ("parts", 0.5, "eager", four),
                                       ("lowered", 0.5, "aot_eager", one)):
        found[name] = distill(model_of(), Texts(padded=True), inner=inner, hidden=hidden,
                              args=arguments(tmp_path / name, max_steps=2, **sizes)).state.log_history[:2]
    first, second = ([found["with"][step][key] for key in ("loss", "kl", "grad_norm")] for step in (0, 1))
    assert first[1] == pytest.approx(found["without"][0]["kl"]) and first[0] - first[1] > 0.01
    assert (second[0] - second[1]) / (first[0] - first[1]) == pytest.approx(0.5, rel=0.3)
    for name in ("parts", "lowered"):
        assert [found[name][0][key] for key in ("loss", "kl", "grad_norm")] == pytest.approx(first, rel=1e-4), name


# --- Muon -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (3, 16, 40)])
def test_orthogonal(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    found = orthogonal(gradient)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35 and F.cosine_similarity(
        found.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def test_a_matrix_as_torch_has_it():
    """Three steps beside ``torch.optim.Muon``, whose products are rounded to bf16; a stack of two is two of them."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 12, 20), torch.randn(3, 2, 12, 20)
    stack = torch.nn.Parameter(start.clone())
    apart = [torch.nn.Parameter(one.clone()) for one in start]
    ours = Muon([{"params": [stack], "matrices": True}], lr=0.1, betas=(0.9, 0.98), weight_decay=0.1)
    theirs = torch.optim.Muon(apart, lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        stack.grad = gradient
        for one, own in zip(apart, gradient):
            one.grad = own.clone()
        ours.step(), theirs.step()
    moved = stack.detach() - start
    assert (moved - (torch.stack([p.detach() for p in apart]) - start)).norm() / moved.norm() < 0.05


def test_the_rest_as_adamw_has_it():
    torch.manual_seed(0)
    own, other = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    options = dict(lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    ours, theirs = Muon([{"params": [own]}], **options), torch.optim.AdamW([other], **options)
    for _ in range(5):
        own.grad = other.grad = torch.randn(5)
        ours.step(), theirs.step()
    torch.testing.assert_close(own, other)


def test_which_parameters_are_matrices():
    model = model_of()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = groups_of(model, 0.1)
    matrices = {names[id(p)] for g in groups if g["matrices"] for p in g["params"]}
    others = {names[id(p)]: g["weight_decay"] for g in groups if not g["matrices"] for p in g["params"]}
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj.weight"} <= matrices
    assert others["model.embed_tokens.weight"] == others["lm_head.weight"] == 0.1 and others["model.norm.weight"] == 0.0
    assert matrices.isdisjoint(others) and len(matrices) + len(others) == len(names)


def test_a_run_resumes_with_muon(tmp_path):
    """Optimizer state comes back from the checkpoint: the same weights as without a stop."""
    def run(folder, steps, **options):
        return distill(model_of(), Texts(), inner="eager", optimizer="muon", hidden=0.5, **options, args=arguments(
            folder, max_steps=4, save_strategy="steps", save_steps=steps))
    whole = run(tmp_path / "whole", 2)
    assert type(whole.optimizer.optimizer if hasattr(whole.optimizer, "optimizer") else whole.optimizer) is Muon
    want = copy.deepcopy(whole.model.state_dict())
    resumed = run(tmp_path / "whole", 2, resume=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0, msg=name)
