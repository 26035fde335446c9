"""The launch scripts: linted, their commands rendered, their YAML as its readers see it."""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from fne_jax import configuration
from fne_jax.parallel import processes
from tests.support import TOP

LAUNCH = TOP / "launch"


def bash(script, *arguments, **variables):
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        cwd=TOP, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def commands_of(done):
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line.endswith(" ")]


def train_arguments(command):
    """Returns the parsed process flags of a train command; fails on what train would refuse."""
    parser = argparse.ArgumentParser()
    for name in ("--config", "--workdir"):
        parser.add_argument(name, required=True)
    processes.add_arguments(parser)
    options, overrides = parser.parse_known_args(command[command.index("fne_jax.train") + 1 :])
    configuration.load_config(str(TOP / options.config), overrides)
    return options


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    done = subprocess.run(
        [shellcheck, "--external-sources", *scripts], cwd=TOP, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_local_starts_processes_that_know_their_place():
    done = bash("local.sh", "--dry-run", "configs/shapes.py", "runs/x", "--config.seed=3",
                PROCESSES="3", PORT="1234")  # fmt: skip
    install, prepare, *train, evaluate = commands_of(done)
    assert install[0] == "install_project" and len(train) == 3
    assert "fne_jax.prepare" in prepare and "fne_jax.evaluate" in evaluate
    for index, command in enumerate(train):
        assert command[:2] == ["env", f"JAX_LOCAL_DEVICE_IDS={index}"]
        place = processes.explicit_place(train_arguments(command), {})
        assert place == {
            "coordinator_address": "localhost:1234", "num_processes": 3, "process_id": index
        }  # fmt: skip
    one = commands_of(bash("local.sh", "--dry-run"))[2]
    assert processes.explicit_place(train_arguments(one), {}) is None


PYTHON = """#!/usr/bin/env bash
# Stands for the installed Python: its train command saves on SIGTERM, for a while.
case "$*" in
  *fne_jax.train*) trap 'sleep 0.3; echo saved; exit 143' TERM ;;
  *) exit 0 ;;
esac
echo begun
while true; do sleep 0.1; done
"""


def test_local_waits_until_each_process_has_saved(tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(TOP / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", tmp_path / "launch" / "local.sh"],
        env=os.environ | {"PROCESSES": "2", "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    while lines.count("begun") < 2:
        lines.append(process.stdout.readline().strip())
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate()
    assert rest.split() == ["saved", "saved"] and process.returncode == 143


def test_slurm_prepares_once_and_trains_in_every_task():
    done = bash("slurm.sbatch", "configs/flickr30k.py", "/runs/x", "--config.seed=3", DRY_RUN="1")
    _, prepare, train = commands_of(done)
    assert prepare[:3] == ["srun", "--nodes=1", "--ntasks=1"] and "fne_jax.prepare" in prepare
    assert train[0] == "srun" and train_arguments(train).workdir == "/runs/x"
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"], "JAX gives each task one GPU"
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert bash("slurm.sbatch", DRY_RUN="1").returncode == 2


GCLOUD = """#!/bin/bash
# Stands for gcloud: the first slice is taken away while it trains, the second trains to the end.
echo "$*" >>"$LOG"
case "$*" in
  *describe*) cat "$STATE" 2>/dev/null ;;
  *create*) echo ACTIVE >"$STATE" ;;
  *delete*) rm "$STATE" ;;
  *fne_jax.train*)
    if [ ! -e "$STATE.once" ]; then
      touch "$STATE.once"
      echo "$AFTER" >"$STATE"
      exit 255
    fi ;;
esac
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """Runs tpu_vm.sh with a stand-in for gcloud; returns it finished, and the stand-in's calls."""
    path = tmp_path / "gcloud"
    path.write_text(GCLOUD)
    path.chmod(0o755)

    def call(after):
        done = bash(
            "tpu_vm.sh", "fne", "us-west4-a", "v5litepod-16", "configs/flickr30k.py", "/runs/x",
            "--config.data.dir=/runs/my data",
            PATH=f"{tmp_path}:{os.environ['PATH']}", LOG=str(tmp_path / "log"), AFTER=after,
            STATE=str(tmp_path / "state"), NFS="10.0.0.2:/runs", POLL_SECONDS="0.1",
        )  # fmt: skip
        calls = (tmp_path / "log").read_text().splitlines()
        return done, [c for c in calls if "describe" not in c]

    return call


def verbs(calls):
    return [re.search(r"create|scp|ssh|delete", call)[0] for call in calls if "--zone" in call]


def test_a_slice_taken_away_is_asked_for_again(tpu_vm):
    done, calls = tpu_vm("SUSPENDED")
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "ssh", "ssh"]
    assert verbs(calls) == [*once, "delete", *once, "delete"]
    create = next(call for call in calls if "create" in call)
    for part in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"):
        assert part in create
    assert create.endswith("--spot")
    train = next(call for call in calls if "fne_jax.train" in call)
    assert "--worker=all" in train
    command = shlex.split(train.partition("--command=")[2])
    assert command[-1] == "--config.data.dir=/runs/my data"
    assert train_arguments(command).workdir == "/runs/x"


def test_a_run_that_fails_on_its_slice_leaves_it(tpu_vm):
    done, calls = tpu_vm("ACTIVE")
    assert done.returncode == 255 and "while its slice is there" in done.stderr
    assert "delete" not in verbs(calls)


def test_tpu_vm_wants_its_arguments():
    done = bash("tpu_vm.sh", "fne")
    assert done.returncode == 2 and "usage: bash launch/tpu_vm.sh" in done.stderr
    place = ("us-west4-a", "v99-8", "configs/flickr30k.py", "/runs/x")
    done = bash("tpu_vm.sh", "--dry-run", "fne", *place, NFS="h:/runs")
    assert done.returncode == 2 and "set RUNTIME" in done.stderr


def test_jobsets():
    sets = {
        document["metadata"]["labels"]["device"]: document
        for document in yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    }
    assert sets.keys() == {"tpu", "gpu"}
    for device, document in sets.items():
        assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
        [replicated] = document["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
        [rule] = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["values"] == [2]
        pod = job["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 30 and pod["restartPolicy"] == "Never"
        [container] = pod["containers"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        train_arguments(container["command"] + container["args"])
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
        environment = {v["name"]: v["value"] for v in container.get("env", ())}
        no_flags = argparse.Namespace(coordinator=None, processes=None, process_index=None)
        last = environment | {"JOB_COMPLETION_INDEX": str(job["completions"] - 1)}
        place = processes.explicit_place(no_flags, last)
        if device == "tpu":
            chips = container["resources"]["limits"]["google.com/tpu"] * job["parallelism"]
            rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
            assert place is None and chips == int(rows) * int(columns)
        else:
            assert place["process_id"] == place["num_processes"] - 1
            name = document["metadata"]["name"]
            first = f"{name}-{replicated['name']}-0-0.{name}"
            assert place["coordinator_address"].startswith(first + ":")


def test_sky():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    nodes = "10.0.0.1\n10.0.0.2"
    script = task["run"].replace("exec .venv/bin/python", "printf '%q '")
    done = subprocess.run(
        ["bash", "-c", script],
        env=task["envs"]
        | {"SKYPILOT_NODE_IPS": nodes, "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
        | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    [command] = commands_of(done) if done.stdout.endswith("\n") else [shlex.split(done.stdout)]
    options = train_arguments(command)
    assert options.workdir.startswith(*task["file_mounts"])
    place = processes.explicit_place(options, {})
    assert place["coordinator_address"] == "10.0.0.1:12355" and place["num_processes"] == 2
    assert task["num_nodes"] == 2 and task["resources"]["use_spot"]


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text()
    assert re.findall(r"^FROM (?:base|python:3.11-slim) AS (\w+)$", text, re.MULTILINE) == [
        "base", "cuda", "tpu"
    ]  # fmt: skip
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (TOP / source).exists(), source
    setup = (TOP / "setup.py").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert f'"{extra}": ["jax[' in setup
