"""Published models at full size, as Hugging Face configurations written down.

Contract: ``source_of(name)`` gives a folder with a ``config.json`` for ``diagnose.planned``. Nothing is downloaded: the figures
are those of the model's public ``config.json`` on huggingface.co (the repository stands in the comment), without what does
not change a shape. ``experts`` is what expert parallelism can divide.
"""
from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError

CONFIGS: dict[str, dict] = {
    # deepseek-ai/DeepSeek-V2-Lite; arXiv 2405.04434, appendix B
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "max_position_embeddings": 163840},
    # Qwen/Qwen3-30B-A3B; arXiv 2505.09388, table 2
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960},
    # meta-llama/Llama-4-Scout-17B-16E, text_config
    "llama-4-scout": {
        "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8192, "use_qk_norm": True, "max_position_embeddings": 262144},
    # deepseek-ai/DeepSeek-V3; arXiv 2412.19437, section 4.2. Without the multi-token-prediction layer.
    "deepseek-v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "max_position_embeddings": 163840},
    # Qwen/Qwen3-235B-A22B; arXiv 2505.09388, table 2
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960},
    # openai/gpt-oss-120b; arXiv 2508.10925, table 1
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072},
}
PUBLISHED = tuple(CONFIGS)
# What arXiv 2511.11505 trains: 71 billion parameters in 6 layers, so all of them are MoE.
CONFIGS["deepseek-v3-6-layers"] = {**CONFIGS["deepseek-v3"], "num_hidden_layers": 6, "first_k_dense_replace": 0}
# Nobody's: DeepSeek-V3 with its experts in quarters, for what 1024 ranks do to the graph.
CONFIGS["deepseek-v3-1024-experts"] = {
    **CONFIGS["deepseek-v3"], "n_routed_experts": 1024, "moe_intermediate_size": 512, "n_shared_experts": 4}
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


@contextmanager
def source_of(name: str | Path) -> Iterator[Path]:
    """The configuration to build ``name`` from: one of ``CONFIGS``, a ``config.json``, or a folder with one."""
    if str(name) in CONFIGS:
        with tempfile.TemporaryDirectory(prefix="farskip-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**CONFIGS[str(name)], "dtype": "bfloat16"}), encoding="utf-8")
            yield Path(folder)
    elif Path(name).exists():
        yield Path(name)
    else:
        raise ConfigError(f"{name} is neither a known model ({', '.join(PUBLISHED)}) nor a config.json or the folder with one")


def experts_of(config) -> int:
    """Experts of a layer, of a configuration of transformers or one written down; 0: none.

    Llama 4 and others have several of the names; they agree.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((n for key in _EXPERTS if isinstance(n := getattr(config, key, None), int)), 0)
