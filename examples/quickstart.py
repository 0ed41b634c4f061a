"""One process, no network: convert an unmodified Hugging Face MoE model in one line, see what changed, generate.

    python examples/quickstart.py

The model is built from a configuration (nothing is downloaded), so its text means nothing; its graph is the real one.
"""
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

import farskip_fx as fs

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(DeepseekV3Config(
    vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    initializer_range=0.1)).eval()
ids = torch.randint(0, 256, (1, 16))

with torch.no_grad():
    original = model(ids).logits
    # One line. inner="eager" skips Inductor so that this runs in seconds; leave it out for speed.
    fs.apply(model, connectivity="farskip", inner="eager")
    converted = model(ids).logits

print(fs.last_reports()[-1])
print(f"\nlogits moved by {(converted - original).abs().max():.3f}: the connectivity is another one, and accuracy needs "
      "distillation")
print("generate goes through the same graph:", model.generate(ids, max_new_tokens=4, do_sample=False)[0, 16:].tolist())

fs.remove(model)
with torch.no_grad():
    print("removed: logits are the original ones again:", torch.equal(model(ids).logits, original))
