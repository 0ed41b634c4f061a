"""Tasks of lm-eval on a converted model: with lm-eval where it is installed, and with a stand-in that records its calls."""
import collections
import random
import sys
import types

import pytest
import torch

import farskip_fx as fs
import farskip_fx.report as reports
from farskip_fx.distill import lm_eval, lm_eval_task
from farskip_fx.errors import ConfigError, WrongConnectivityError

from distill_cases import characters, model_of

FOUND = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4},
         "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.25, "exact_match,flexible": 0.75, "sample_len": 4}}


@pytest.fixture
def stand_in(monkeypatch):
    """lm-eval's two names that are used, by their documented signatures; it calls the model if ``calls`` is true."""
    seen = types.SimpleNamespace(calls=True)

    class HFLM:
        def __init__(self, **given):
            seen.model = given

    def simple_evaluate(model, **given):
        seen.evaluate, seen.training = given, seen.model["pretrained"].training
        random.seed(0), torch.manual_seed(0)
        if seen.calls:
            seen.text = seen.model["pretrained"].generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False)
        return {"results": {name: FOUND[name] for name in given["tasks"]}}

    package, models, huggingface = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    package.simple_evaluate, huggingface.HFLM = simple_evaluate, HFLM
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_what_lm_eval_is_given(stand_in, monkeypatch):
    monkeypatch.setattr(reports, "_recent", collections.deque())        # reports of other tests may have the same conversion
    model, tokenizer = fs.apply(model_of().train(), connectivity="farskip", inner="eager"), characters()
    stand_in.calls = False
    with pytest.raises(WrongConnectivityError, match="no graph of this model was rewired"):
        lm_eval(model, tokenizer, ["arc"])
    stand_in.calls = True
    numbers = random.getstate(), torch.get_rng_state()
    got = lm_eval(model, tokenizer, ["arc", "gsm8k"], limit=4, num_fewshot=2, batch_size=3, gen_kwargs="top_k=1")
    assert got == {"arc": {"acc": 0.5}, "gsm8k": {"exact_match,strict": 0.25, "exact_match,flexible": 0.75}}
    assert stand_in.model == dict(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3, max_length=None)
    assert stand_in.evaluate == dict(tasks=["arc", "gsm8k"], limit=4, num_fewshot=2, log_samples=False, bootstrap_iters=0,
                                     gen_kwargs="top_k=1")
    assert stand_in.text.shape == (1, 4) and not stand_in.training and model.training
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert lm_eval_task("arc", tokenizer)(model) == 0.5
    assert lm_eval_task("gsm8k", tokenizer, "exact_match,flexible", limit=1)(model) == 0.75
    with pytest.raises(ConfigError, match="metric=None not among its metrics: exact_match,strict, exact_match,flexible"):
        lm_eval_task("gsm8k", tokenizer)(model)


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'farskip_fx\[eval\]'"):
        lm_eval(model_of(), characters(), ["arc"])


def test_with_lm_eval(tmp_path):
    """Two tasks made here: likelihoods of choices, and answers by ``generate``; against the model itself."""
    pytest.importorskip("lm_eval", reason="pip install 'farskip_fx[eval]'")
    (tmp_path / "data.jsonl").write_text("".join(f'{{"q": "{q}", "a": "{a}"}}\n' for q, a in (("abc", "d"), ("xy", "z"), ("lmno", "c"))))
    shared = dict(dataset_path="json", dataset_kwargs={"data_files": {"test": str(tmp_path / "data.jsonl")}}, test_split="test",
                  doc_to_text="{{q}}", target_delimiter="")
    model, tokenizer = fs.apply(model_of(pad_token_id=0).eval(), connectivity="farskip", inner="eager"), characters()
    answers = {}
    for q in ("abc", "xy", "lmno"):
        ids = torch.tensor([tokenizer(q)["input_ids"]])
        for _ in range(2):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        answers[q] = tokenizer.decode(ids[0, -2:], skip_special_tokens=True)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([tokenizer(q)["input_ids"]]), use_cache=False).logits[0, -1] for q in answers]
    right = sum(max("dzc", key=lambda c: row[tokenizer(c)["input_ids"][0]].item()) == a for row, a in zip(logits, "dzc")) / 3
    choice = {**shared, "task": "choice", "output_type": "multiple_choice", "doc_to_choice": ["d", "z", "c"],
              "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]}
    seen = []
    answer = {**shared, "task": "answer", "output_type": "generate_until", "doc_to_target": "{{a}}",
              "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
              "process_results": lambda doc, results: seen.append((doc["q"], results[0])) or {"exact_match": results[0] == doc["a"]},
              "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    found = lm_eval(model, tokenizer, [choice, answer], max_length=32)
    assert found["choice"]["acc"] == pytest.approx(right)
    assert dict(seen) == answers
