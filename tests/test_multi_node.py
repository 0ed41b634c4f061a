"""Several nodes are torchrun's work: here it really starts examples/train_ep.py, on two nodes (network namespaces) or one, and
starts it again when a worker dies. And the files for Slurm and Kubernetes name what torchrun and train_ep.py know.
"""
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
SCRIPT, FOLDER = ROOT / "examples" / "train_ep.py", ROOT / "examples" / "multi_node"
TORCHRUN = Path(sys.executable).with_name("torchrun")
STEPS, SAVED_AT, KILLED_AT = 19, 10, 12         # one checkpoint; some steps before it, some between, some after
OPTIONS = [f"--steps={STEPS}", f"--save-every={SAVED_AT}", "--print-every=1", "--inner=eager", "--accumulate=2", "--layers=2",
           "--length=64"]
LAUNCHERS = {"two nodes": [str(FOLDER / "two_namespaces.sh")],
             "one node": [str(TORCHRUN), "--standalone", "--nproc-per-node=2", "--max-restarts=1", str(SCRIPT)]}


def refused():
    """Why this machine makes no network namespaces, or nothing."""
    rights = ["--user", "--map-root-user"] if os.getuid() else []
    try:
        done = subprocess.run(["unshare", "--net", "--pid", "--fork", "--kill-child", *rights,
                               "ip", "link", "add", "far0", "type", "veth", "peer", "name", "far1"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip()


REFUSED = refused()
TWO_NODES = pytest.param("two nodes", marks=pytest.mark.skipif(bool(REFUSED), reason=f"no network namespaces: {REFUSED}"))
# CI takes the one that tests more: a start of two workers costs half a minute of CPU.
ONE_NODE = pytest.param("one node", marks=[] if REFUSED else pytest.mark.slow)


def run(launcher, checkpoints, killed=None):
    """What is printed, by all starts of the workers. `killed`: the step after which rank 1 is killed."""
    environment = {**os.environ, "TORCHRUN": str(TORCHRUN), "CUDA_VISIBLE_DEVICES": "",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}       # why: examples/multi_node/README.md
    errors = checkpoints.with_suffix(".stderr")
    with errors.open("w") as to:
        process = subprocess.Popen([*LAUNCHERS[launcher], *OPTIONS, f"--checkpoints={checkpoints}"], stdout=subprocess.PIPE,
                                   stderr=to, text=True, env=environment)
    watch = threading.Timer(400, end, [process])
    watch.start()
    lines, victim = [], None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if killed and victim is None and line.startswith("step"):
                victim = worker(checkpoints, rank=1)    # looked for early: the kill must not come late
            if killed and step_of(line) == killed:
                os.kill(victim, signal.SIGKILL)
                killed = None
        assert process.wait(60) == 0, errors.read_text()[-6000:]
    finally:
        watch.cancel()
        end(process)
    return lines


def end(process):
    """torchrun ends its workers when asked to; the namespaces end theirs when killed."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def worker(checkpoints, rank):
    """The process id of a rank of this run: in /proc, since torchrun tells nobody (also from inside the namespaces)."""
    for one in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (one / "cmdline").read_bytes(), (one / "environ").read_bytes().split(b"\0")
        except OSError:
            continue                                    # ended meanwhile, or not ours
        if f"{checkpoints}".encode() in command and f"RANK={rank}".encode() in environment:
            return int(one.name)
    raise AssertionError(f"rank {rank} does not run")


def step_of(line):
    return int(line.split()[1]) if line.startswith("step") else None


def losses(lines):
    return {step_of(line): line.split()[3] for line in lines if line.startswith("step")}


@pytest.mark.parametrize("launcher", [TWO_NODES, ONE_NODE])
def test_a_killed_worker(launcher, tmp_path):
    """All workers start again, from the checkpoint; the steps since then have the losses that they had without a restart."""
    lines = run(launcher, tmp_path / "run", killed=KILLED_AT)
    again = [number for number, line in enumerate(lines) if "goes on after step" in line]
    assert [lines[n] for n in again] == [f"goes on after step {SAVED_AT}"]
    before, after = losses(lines[:again[0]]), losses(lines[again[0]:])
    assert list(before) == list(range(1, len(before) + 1)) and KILLED_AT <= len(before) < STEPS
    assert list(after) == list(range(SAVED_AT + 1, STEPS + 1))
    twice = before.keys() & after.keys()
    assert len(twice) >= KILLED_AT - SAVED_AT and {s: before[s] for s in twice} == {s: after[s] for s in twice}
    assert float(after[STEPS]) < float(before[1]) - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TWO_NODES, ONE_NODE])
def test_to_the_end(launcher, tmp_path):
    """A run with a restart against one without, to the last step; the network between the ranks changes nothing."""
    whole = losses(run("one node", tmp_path / "whole"))
    assert list(whole) == list(range(1, STEPS + 1))
    assert losses(run(launcher, tmp_path / "killed", killed=KILLED_AT)) == whole


# ---------------------------------------------------------------------------------------------------------------------
# The files for clusters
# ---------------------------------------------------------------------------------------------------------------------


def slurm_command(tmp_path):
    """What srun is told to run, from the script itself, with stand-ins for Slurm's commands."""
    text = (FOLDER / "slurm.sbatch").read_text().replace("source .venv/bin/activate", "")
    for name, body in {"scontrol": "printf 'node7\\nnode9\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "32"}
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, check=True,
                          env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **told})
    words = done.stdout.splitlines()
    return words[words.index("torchrun"):]


def kubernetes_command(_):
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    workers = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    policy = job["spec"]["elasticPolicy"]
    assert job["kind"] == "PyTorchJob" and workers["replicas"] == policy["minReplicas"] == policy["maxReplicas"] == 2
    container, = workers["template"]["spec"]["containers"]
    command = container["command"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-worker-0:{container['ports'][0]['containerPort']}" in command
    assert f"--max-restarts={policy['maxRestarts']}" in command
    return command


def namespaces_command(_):
    text = re.search(r"(--nnodes 2 .*?)\n}", (FOLDER / "two_namespaces.sh").read_text(), re.S).group(1)
    return ["torchrun", *shlex.split(text.replace("\\\n", " ").replace("${PROCESSES:-1}", "1").replace('"$@"', shlex.join(OPTIONS)))]


FILES = {slurm_command: "slurm.sbatch", kubernetes_command: "pytorchjob.yaml", namespaces_command: "two_namespaces.sh"}


@pytest.mark.parametrize("command", FILES)
def test_the_command_of(command, tmp_path):
    known = get_args_parser().parse_args(command(tmp_path)[1:])
    assert (known.nnodes, known.rdzv_backend, known.max_restarts) == ("2", "c10d", 3)
    assert re.fullmatch(r"(node7|train-ep-worker-0|10\.213\.7\.1):29500", known.rdzv_endpoint)
    assert known.training_script == "examples/train_ep.py"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in (FOLDER / FILES[command]).read_text()
    options = set(re.findall(r'add_argument\("(--[a-z-]+)"', SCRIPT.read_text()))
    assert {word.split("=")[0] for word in known.training_script_args if word.startswith("--")} <= options


@pytest.mark.parametrize("name", ["slurm.sbatch", "two_namespaces.sh"])
def test_bash_reads(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
