"""The wheel holds the passes, and the backend's name works from another folder."""
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
USE = """
import torch
from torch import nn
import farskip_fx, farskip_fx.passes.rewire
assert "farskip" in torch._dynamo.list_backends()
net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
options = {"connectivity": "none", "inner": "eager"}
x = torch.randn(2, 4)
assert torch.equal(torch.compile(net, backend="farskip", options=options)(x), net(x))
print(farskip_fx.__file__, farskip_fx.passes.__file__, "top-level passes:", __import__("importlib.util").util.find_spec("passes"))
"""


def test_wheel_in_an_empty_environment(tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python3*/site-packages"))
    # From a copy: a build in the checkout would leave build/ and an egg-info behind.
    source = tmp_path / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                    "--target", str(site), str(source)], check=True)
    # The dependencies come from the environment that runs this test; .pth files in it are not read this way, so its
    # own (editable) farskip_fx stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    done = subprocess.run([str(python), "-c", USE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(site / "farskip_fx" / "passes") in done.stdout and "top-level passes: None" in done.stdout
