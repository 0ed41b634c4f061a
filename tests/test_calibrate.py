"""``calibrate``: rates that are measured once, kept, and the same on every rank."""
import json
import stat

import families
import pytest
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

import farskip_fx as fs
from farskip_fx.commands.calibrate import rates_of
from farskip_fx.cli import main
from farskip_fx.passes.costs import PRESETS

SMALL = {"hidden": 128, "tokens": 64}


def test_kept_for_this_user_and_measured_again_where_it_cannot_be_read(tmp_path):
    folder = tmp_path / "cache"
    first = fs.calibrate(cache=folder, **SMALL)
    assert first.matmul_flops > 0 and first.kernel_overhead > 0 and first.link_bytes == fs.Rates().link_bytes
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.write_text(json.dumps({**json.loads(file.read_text()), "matmul_flops": 7.0}))
    assert fs.calibrate(cache=folder, **SMALL).matmul_flops == 7.0
    assert fs.calibrate(cache=folder, hidden=128, tokens=32).matmul_flops != 7.0        # other sizes, another file
    for broken in ("{", '{"matmul_flops": -1}'):
        file.write_text(broken)
        assert fs.calibrate(cache=folder, **SMALL).matmul_flops > 7.0


def test_command_and_what_takes_its_file(tmp_path, capsys):
    path = tmp_path / "rates.json"
    assert main(["calibrate", "--hidden", "128", "--tokens", "64", "--json", str(path)]) == 0
    assert "not measured: run under torchrun" in capsys.readouterr().out
    assert rates_of(str(path)).matmul_flops > 0 and rates_of("cpu") == PRESETS["cpu"]
    for text in ("[]", "{", '{"unknown": 1}'):
        path.write_text(text)
        with pytest.raises(fs.ConfigError):
            rates_of(str(path))
    with pytest.raises(fs.ConfigError, match="neither one of cpu"):
        rates_of("h200")


def test_apply_measures_where_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = fs.apply(families.tiny("qwen3_moe"), costs="profiled", inner="eager")
    config = model.model.forward.config
    assert config.costs == "profiled" and config.rates != fs.Rates() and len(list((tmp_path / "farskip_fx").iterdir())) == 1
    assert fs.FarskipConfig.from_json(config.to_json()) == config
    own = fs.Rates(matmul_flops=1e9)
    assert fs.apply(families.tiny("qwen3_moe"), costs="profiled", rates=own).model.forward.config.rates == own
    with pytest.raises(fs.ConfigError, match="farskip_fx.calibrate"):
        fs.FarskipConfig(costs="profiled")


def measured(rank, folder):
    """Only rank 1 has nothing to read the second time."""
    one = fs.calibrate(cache=folder / "both", **SMALL)
    return one, fs.calibrate(cache=folder / ("both" if rank == 0 else "empty"), **SMALL)


@pytest.mark.slow
def test_the_same_on_every_rank(tmp_path):
    (one, again), (other, other_again) = run_ranks(measured, 2, folder=tmp_path)
    assert one == other == again == other_again and one.link_bytes != fs.Rates().link_bytes
    assert not (tmp_path / "empty").exists()


def several(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    first = fs.calibrate(mesh["node"], also=[mesh["local"]], cache=folder, **SMALL)
    return first, fs.calibrate(mesh["node"], also=[mesh["local"]], cache=folder, **SMALL), fs.calibrate(cache=folder, **SMALL)


@pytest.mark.slow
def test_a_link_for_each_group(tmp_path):
    """Four ranks, two by two: the group of neighbours has figures of its own, equal on all ranks and kept."""
    (first, again, plain), *others = run_ranks(several, 4, folder=tmp_path)
    assert all(other == (first, again, plain) for other in others) and first == again
    (shape, (rate, latency)), = first.links
    assert shape == "2x1" and rate > 0 and latency > 0 and not plain.links
