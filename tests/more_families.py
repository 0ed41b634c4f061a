"""The other mixture-of-experts families of transformers 5.23.0, in the form of families.SPEC: "also tried" in
docs/families.md."""

SP = ["dense", "sparse", "sparse"]
MHA = dict(num_key_value_heads=4)

MORE = {
 "axk1": ("AXK1Config", "AXK1ForCausalLM", dict(MHA, head_dim=8, n_group=2, topk_group=1, mlp_layer_types=SP)),
 "beam": ("BeamConfig", "BeamForCausalLM", dict(n_group=2, topk_group=1, mlp_layer_types=SP)),
 "dots1": ("Dots1Config", "Dots1ForCausalLM", dict(n_group=2, topk_group=1, sliding_window=None)),
 "hunyuan_v1_moe": ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", dict(intermediate_size=32)),
 "hy_v4": ("HYV4Config", "HYV4ForCausalLM", dict(MHA, mlp_layer_types=SP, hc_mult=2)),
 "inkling2": ("Inkling2TextConfig", "Inkling2ForCausalLM", dict(swa_num_attention_heads=4, swa_num_key_value_heads=2,
              swa_head_dim=16, d_rel=4, rel_extent=16, n_layers_per_attn_res_block=2, unpadded_vocab_size=120)),
 "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", dict(kv_channels=16, intermediate_size=32)),
 "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", dict(MHA, mlp_layer_types=SP,
                 layer_types=["linear_attention", "full_attention", "linear_attention"])),
 "lfm2_moe": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", dict(layer_types=["conv", "full_attention", "conv"])),
 "longcat_flash": ("LongcatFlashConfig", "LongcatFlashForCausalLM", dict(MHA, num_layers=2, ffn_hidden_size=96,
                   head_dim=8, qk_head_dim=24, expert_ffn_hidden_size=32, zero_expert_num=2)),
 "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", dict(intermediate_size=32, block_size=8, sliding_window=None,
             layer_types=["linear_attention", "full_attention", "linear_attention"], full_attn_alpha_factor=1.3,
             full_attn_beta_factor=0.9, linear_attn_alpha_factor=1.2, linear_attn_beta_factor=0.8, mlp_alpha_factor=1.1,
             mlp_beta_factor=0.7)),
 "minimax_m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", dict(intermediate_size=32)),
 "muse_spark": ("MuseSparkTextConfig", "MuseSparkTextModel", dict(moe_hidden_size=32, mlp_layer_types=SP), True),
 "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", dict(intermediate_size=32, sliding_window=None)),
 "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", dict(
                 layer_types=["linear_attention", "full_attention", "linear_attention"], rope_parameters=dict(
                 rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3], partial_rotary_factor=1.0))),
 "solar_open": ("SolarOpenConfig", "SolarOpenForCausalLM", {}),
 "zaya": ("ZayaConfig", "ZayaForCausalLM", dict(router_hidden_size=32, num_experts_per_tok=1, sliding_window=None)),
}
