"""The pictures of docs/report.md, made again: ``make pictures`` (needs Chromium; a minute).

Two models that are only looked at: four layers of Qwen3-MoE, forward and backward, and 94 layers of a DeepSeek-V3, both small
enough to be drawn in seconds and split over two ranks that are not there.
"""
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser  # noqa: E402

from farskip_fx.commands.explain import explain_source  # noqa: E402
from farskip_fx.view import terminal  # noqa: E402

FOLDER = Path(__file__).parents[1] / "docs" / "img"
QWEN = {"model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 2048,
        "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "torch_dtype": "float32"}
DEEPSEEK = {"model_type": "deepseek_v3", "vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 94,
            "first_k_dense_replace": 1, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_attention_heads": 8,
            "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "n_shared_experts": 1, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
            "v_head_dim": 64, "torch_dtype": "float32"}


def report_of(config: dict, folder: Path):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return explain_source(path, ep=2, tokens=2048, batch=1, training=True, rates=None, options={}, fold=True, predict=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, Browser() as browser:
        folder = Path(name)
        for config, layer, dark, picture in ((QWEN, 2, False, "report-light.png"), (DEEPSEEK, 2, True, "report-dark.png")):
            report = report_of(config, folder)
            page = browser.open(report.to_html(folder / f"{picture}.html"), dark=dark)
            for _ in range(layer + 1):
                page.key("ArrowDown")
            page.key("Enter")
            page.settle()
            page.screenshot(FOLDER / picture, captureBeyondViewport=True)
            if config is QWEN:
                console = Console(record=True, width=120, file=open(folder / "terminal.txt", "w"))
                terminal.show(report.to_dict(), console)
                # One id for all: the file is the same whenever the report is.
                console.save_svg(str(FOLDER / "report-terminal.svg"), title="farskip explain config.json --ep 2 --train",
                                 unique_id="farskip")
            print(f"written: {FOLDER / picture}")


if __name__ == "__main__":
    main()
