"""Tiny models and data for the tests of distillation; run as a script it is a run that kills itself."""
import os
import signal
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments

from farskip_fx.distill import distill

WIDTH, VOCABULARY, LENGTH = 32, 64, 16


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        head_dim=8, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, use_cache=False,
        sliding_window=None, **options))
    with torch.no_grad():       # freshly initialised weights say nothing, and the conversion would not matter
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(30 if "lm_head" in name else 6)
    model.set_experts_implementation("grouped_mm")      # traces faster than the loop over experts
    return model


def characters():
    """A tokenizer of characters, as a checkpoint has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<end>": 0, **{chr(96 + i): i for i in range(1, 27)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_model_and_text(folder):
    """What the file of a run names: FOLDER/model, with a tokenizer, and FOLDER/text.txt."""
    model_of().save_pretrained(folder / "model")
    characters().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 12)


class Texts(torch.utils.data.Dataset):
    """Rows that can be learned: each token is one more than the last, mostly. ``padded``: some rows end early."""

    def __init__(self, rows=32, seed=0, padded=False):
        g = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (rows, LENGTH), generator=g)
        self.ids = (torch.randint(VOCABULARY, (rows, 1), generator=g) + steps.cumsum(1)) % VOCABULARY
        self.mask = torch.ones_like(self.ids)
        if padded:
            for row in range(0, rows, 2):
                self.mask[row, 5 + row % 7:] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        example = {"input_ids": self.ids[index]}
        return example if self.mask.all() else {**example, "attention_mask": self.mask[index]}


def arguments(folder, **options):
    usual = dict(per_device_train_batch_size=4, max_steps=6, use_cpu=True, report_to=[], save_strategy="no",
                 disable_tqdm=True, seed=0, learning_rate=1e-3, logging_steps=1, lr_scheduler_type="cosine", warmup_steps=2)
    return TrainingArguments(str(folder), **{**usual, **options})


class Deadly(Texts):
    """kill -9 at the read number ``reads``: nothing can be cleaned up."""

    def __init__(self, reads, **options):
        super().__init__(**options)
        self.left = reads

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def run(folder, dataset=None, *, resume=False):
    """Seven steps of eight rows, with dropout, accumulation, and a checkpoint at every second step."""
    return distill(model_of(attention_dropout=0.1), dataset or Texts(padded=True), inner="eager", resume=resume,
                   args=arguments(folder, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, max_steps=7))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Deadly(int(sys.argv[2]), padded=True))
