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
from fne_jax.errors import EXIT_ENVIRONMENT_FAILURE, EXIT_USER_ERROR
from fne_jax.parallel import processes
from tests.support import TOP

LAUNCH = TOP / "launch"


def bash(script, *arguments, cwd=TOP, **variables):
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=False,
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
        place = processes.explicit_place(train_arguments(command))
        assert place == {
            "coordinator_address": "localhost:1234", "num_processes": 3, "process_id": index
        }  # fmt: skip
    one = commands_of(bash("local.sh", "--dry-run"))[2]
    assert processes.explicit_place(train_arguments(one)) is None


def test_local_takes_paths_from_where_it_is_called(tmp_path):
    (tmp_path / "mine.py").touch()
    overrides = ["--config.data.dir=pairs", "--config.init_from=runs/before"]
    for config, expected in (("mine.py", "mine.py"), ("configs/coco.py", TOP / "configs/coco.py")):
        done = bash("local.sh", "--dry-run", config, "runs/x", *overrides, cwd=tmp_path)
        _, prepare, train, evaluate = commands_of(done)
        for command in (prepare, train):
            assert f"--config={expected}" in command and command[-2:] == overrides
            # No folder here is taken for the package.
            assert command[:2] == [f"{TOP}/.venv/bin/python", "-P"]
        assert "--workdir=runs/x" in train and "--workdir=runs/x" in evaluate


PYTHON = """#!/usr/bin/env bash
# Stands for the installed Python: its train command saves on a signal, for a while.
case "$*" in
  *fne_jax.train*) trap 'sleep 0.3; echo saved; exit 143' TERM
    trap 'sleep 0.3; echo saved; exit 129' HUP ;;
  *) exit 0 ;;
esac
echo begun
while true; do sleep 0.1; done
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def installed(tmp_path):
    """What the scripts need of the top level, with `PYTHON` for the installed one."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(TOP / name, tmp_path)
    for name in ("python", "pip"):
        write_script(tmp_path / ".venv" / "bin" / name, PYTHON)
    return tmp_path


@pytest.mark.parametrize(
    ("count", "number", "code"), [(2, signal.SIGTERM, 143), (1, signal.SIGHUP, 129)]
)
@pytest.mark.usefixtures("hangup_is_heard")
def test_local_waits_until_each_process_has_saved(installed, count, number, code):
    process = subprocess.Popen(
        ["bash", installed / "launch" / "local.sh"],
        env=os.environ | {"PROCESSES": str(count), "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    while lines.count("begun") < count:
        lines.append(process.stdout.readline().strip())
    process.send_signal(number)
    rest, _ = process.communicate()
    assert rest.split() == ["saved"] * count and process.returncode == code


def test_a_failed_installation_is_not_taken_for_done(installed):
    stamp = installed / ".venv" / "installed[tpu]"
    pip = installed / ".venv" / "bin" / "python"  # `python -m pip`
    # As where it is sourced without `set -e`, and by a command that goes on after it.
    script = f"source {installed}/launch/install.sh; install_project '[tpu]'; echo ended $?"
    for code, text in ((1, "exit 1"), (0, "exit 0")):
        write_script(pip, f"#!/bin/bash\n{text}\n")
        done = subprocess.run(
            ["bash", "-c", script], env=os.environ | {"PYTHON": sys.executable}, cwd="/",
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == f"ended {code}"
        assert stamp.exists() == (code == 0)


def test_slurm_prepares_once_and_trains_in_every_task():
    done = bash("slurm.sbatch", "configs/flickr30k.py", "/runs/x", "--config.seed=3", DRY_RUN="1",
                SLURM_CPUS_ON_NODE="64", SLURM_CPUS_PER_TASK="8")  # fmt: skip
    _, prepare, train = commands_of(done)
    assert prepare[:3] == ["srun", "--nodes=1", "--ntasks=1"] and "fne_jax.prepare" in prepare
    assert train[0] == "srun" and train_arguments(train).workdir == "/runs/x"
    # A step does not inherit them from its job.
    assert "--cpus-per-task=64" in prepare and "--cpus-per-task=8" in train
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"], "JAX gives each task one GPU"
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert bash("slurm.sbatch", DRY_RUN="1").returncode == 2


SRUN = """#!/bin/bash
# Stands for srun: ends with the code given for its command.
case "$*" in *fne_jax.prepare*) exit "$PREPARED" ;; *fne_jax.train*) exit "$TRAINED" ;; esac
"""


@pytest.mark.parametrize(
    ("prepared", "trained", "restarts", "requeued"),
    [
        (0, 0, 0, False),
        (0, 2, 0, False),
        (2, 0, 0, False),
        (0, EXIT_ENVIRONMENT_FAILURE, 0, True),
        (0, 143, 7, True),
        (143, 0, 0, True),
        (0, 143, 50, False),
    ],
)
def test_slurm_requeues_what_may_go_on(installed, prepared, trained, restarts, requeued):
    write_script(installed / "bin" / "srun", SRUN)
    write_script(installed / "bin" / "scontrol", '#!/bin/bash\necho "$@"\n')
    write_script(installed / ".venv" / "bin" / "python", "#!/bin/bash\n")
    done = subprocess.run(
        ["bash", installed / "launch" / "slurm.sbatch", "configs/shapes.py", "/runs/x"],
        env=os.environ
        | {"PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
        | {"PREPARED": str(prepared), "TRAINED": str(trained), "SLURM_JOB_ID": "17"}
        | {"SLURM_RESTART_COUNT": str(restarts)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (prepared or trained)
    assert ("requeue 17" in done.stdout) == requeued


GCLOUD = """#!/bin/bash
# Stands for gcloud: answers `describe` and the train command as two files say, line by line.
next() {
  head -n 1 "$1"
  sed -i 1d "$1"
}
case "$*" in
  *describe*)
    state=$(next "$SCRIPT/states")
    case $state in
      GONE) echo "ERROR: NOT_FOUND: Resource 'fne' was not found" >&2; exit 1 ;;
      BUSY) echo "ERROR: UNAVAILABLE: try again" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  *) echo "$*" >>"$SCRIPT/calls" ;;
esac
case "$*" in *"tpu_worker.sh train"*) exit "$(next "$SCRIPT/codes")" ;; esac
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """Runs tpu_vm.sh with a stand-in for gcloud; returns it finished, and the stand-in's calls."""
    write_script(tmp_path / "gcloud", GCLOUD)

    def call(states, *codes):
        (tmp_path / "states").write_text("\n".join(states.split()))
        (tmp_path / "codes").write_text("\n".join(map(str, codes)))
        (tmp_path / "calls").touch()
        done = bash(
            "tpu_vm.sh", "fne", "us-west4-a", "v5litepod-16", "configs/flickr30k.py", "/runs/x",
            "--config.data.dir=/runs/my data",
            PATH=f"{tmp_path}:{os.environ['PATH']}", SCRIPT=str(tmp_path), NFS="10.0.0.2:/runs",
            POLL_SECONDS="0.01",
        )  # fmt: skip
        for name in ("states", "codes"):
            assert not (tmp_path / name).read_text(), "the script asked less than was foreseen"
        return done, (tmp_path / "calls").read_text().splitlines()

    return call


TRY = ["scp", "ssh", "ssh"]


def verbs(calls):
    return [re.search(r"create|scp|ssh|delete", call)[0] for call in calls if "--zone" in call]


def test_a_slice_taken_away_is_asked_for_again(tpu_vm):
    # It reads as ACTIVE for a while after it was taken.
    states = "GONE ACCEPTED ACTIVE ACTIVE SUSPENDING SUSPENDED GONE WAITING_FOR_RESOURCES ACTIVE"
    done, calls = tpu_vm(states, 255, 255, 0)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", *TRY, *TRY, "delete", "create", *TRY, "delete"]
    create = next(call for call in calls if "create" in call)
    for part in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"):
        assert part in create
    assert create.endswith("--spot")
    train = next(call for call in calls if "tpu_worker.sh train" in call)
    assert "--worker=all" in train and "ServerAliveInterval" in train
    command = shlex.split(train.partition("--command=")[2])
    assert command[-1] == "--config.data.dir=/runs/my data"
    command[command.index("train")] = "fne_jax.train"
    assert train_arguments(command).workdir == "/runs/x"


def test_a_slice_taken_away_before_it_was_there_is_asked_for_again(tpu_vm):
    done, calls = tpu_vm("GONE PROVISIONING SUSPENDED GONE ACTIVE", 0)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", "delete", "create", *TRY, "delete"]


def test_a_question_that_fails_is_asked_again(tpu_vm):
    done, calls = tpu_vm("ACTIVE BUSY ACTIVE", EXIT_ENVIRONMENT_FAILURE, 0)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == [*TRY, *TRY, "delete"]
    done, calls = tpu_vm(" ".join(["BUSY"] * 20))
    assert done.returncode == 74 and "UNAVAILABLE" in done.stderr


def test_a_mistake_leaves_the_slice(tpu_vm):
    done, calls = tpu_vm("ACTIVE", 2)
    assert done.returncode == 2 and "look at the slice, then delete it" in done.stderr
    assert verbs(calls) == TRY


def test_a_run_that_fails_again_and_again_leaves_its_slice(tpu_vm):
    done, calls = tpu_vm(" ".join(["ACTIVE"] * 10), *[1] * 10)
    assert done.returncode == 1 and "10 times in a row" in done.stderr
    assert "delete" not in verbs(calls)


def worker(top, *arguments, **variables):
    return subprocess.run(
        ["bash", top / "launch" / "tpu_worker.sh", *arguments],
        env=os.environ | {"PATH": f"{top / 'bin'}:{os.environ['PATH']}"} | variables,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_worker_waits_for_apt_and_mounts_once(installed):
    calls = installed / "calls"
    write_script(
        installed / "bin" / "sudo",
        f"""#!/bin/bash
        echo "$*" >>{calls}
        case "$*" in
          *update) [ "$(wc -l <{calls})" -gt 2 ] ;; # apt's lock is held twice
          mount*) touch {installed}/mounted ;;
        esac
        """,
    )
    write_script(installed / "bin" / "mountpoint", f"#!/bin/bash\n[ -e {installed}/mounted ]\n")
    write_script(installed / "bin" / "python3.11", "#!/bin/bash\n")
    write_script(installed / ".venv" / "bin" / "python", "#!/bin/bash\n")
    for _ in range(2):
        done = worker(installed, "install", "10.0.0.2:/runs", POLL_SECONDS="0.01")
        assert done.returncode == 0, done.stderr
    asked = [call.split()[0:3:2] for call in calls.read_text().splitlines()]
    once = [["apt-get", "update"], ["apt-get", "install"], ["mkdir", "/runs"]]
    mount = [["mount", "/runs"]]
    assert asked == [["apt-get", "update"]] * 2 + once + mount + once
    assert (installed / ".venv" / "installed[tpu]").exists()


def test_a_worker_stops_the_run_that_a_lost_line_left(installed):
    start = ["bash", installed / "launch" / "tpu_worker.sh", "train", "--config=x"]
    left = subprocess.Popen(start, stdout=subprocess.PIPE, text=True)
    assert left.stdout.readline() == "begun\n"
    again = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert again.stdout.readline() == "begun\n"
    assert left.wait(1) == 143 and left.stdout.read() == "saved\n"
    assert worker(installed, "stop").returncode == 0
    assert again.wait(1) == 143
    assert worker(installed, "stop").returncode == 0, "nothing is left"
    for process in (left, again):
        process.stdout.close()


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
        assert rule["onExitCodes"]["values"] == [EXIT_USER_ERROR]
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        pod = job["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 30 and pod["restartPolicy"] == "Never"
        [container] = pod["containers"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        last = str(job["completions"] - 1)
        command = container["command"] + container["args"]
        options = train_arguments([part.replace("$(POD_INDEX)", last) for part in command])
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
        place = processes.explicit_place(options)
        if device == "tpu":
            chips = container["resources"]["limits"]["google.com/tpu"] * job["parallelism"]
            rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
            assert place is None and chips == int(rows) * int(columns)
        else:
            assert place["process_id"] == place["num_processes"] - 1
            assert [variable["name"] for variable in container["env"]] == ["POD_INDEX"]
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
    place = processes.explicit_place(options)
    assert place["coordinator_address"] == "10.0.0.1:12355" and place["num_processes"] == 2
    assert task["resources"]["use_spot"]
    recovery = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert EXIT_ENVIRONMENT_FAILURE in recovery and EXIT_USER_ERROR not in recovery
    [bucket] = task["file_mounts"].values()
    # A bucket without a cache cannot append, and one with a cache is not a file system to share.
    assert bucket["mode"] == "MOUNT_CACHED" and task["num_nodes"] == 1


def test_sky_brings_its_own_python(installed):
    home = installed / "home"
    home.mkdir()
    conda = f"""#!/bin/bash
    echo "$*" >>{home}/calls
    install -D -m 755 {installed}/.venv/bin/python {home}/python311/bin/python
    """
    write_script(installed / "bin" / "conda", conda)
    write_script(installed / ".venv" / "bin" / "python", "#!/bin/bash\n")
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", task["setup"]], cwd=installed, capture_output=True, text=True,
            env={"PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "HOME": str(home)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (home / "calls").read_text().count("python=3.11\n") == 1
    assert (installed / ".venv" / "installed[cuda]").exists()


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


def test_gpu_bench_measures_what_its_arguments_say(tmp_path):
    done = bash("gpu_bench.sh", "--dry-run", "out", "--rounds=1", cwd=tmp_path)
    _, _, tests, *measured = commands_of(done)
    assert tests[-2:] == ["-m", "gpu"]
    names = [
        argument.removeprefix(f"--out={tmp_path}/out/")
        for command in measured
        for argument in command
        if argument.startswith("--out=")
    ]
    assert names == ["as_configured.json", "kept.json", "kept_256.json", "unfused.json"]
    for command in measured:
        assert command[-1] == "--rounds=1"
        overrides = [a for a in command if a.startswith("--config.")]
        configuration.load_config(str(TOP / "configs" / "flickr30k.py"), overrides)


def test_local_announces_its_steps_and_says_what_comes_next(installed):
    python = installed / ".venv" / "bin" / "python"
    write_script(python, '#!/usr/bin/env bash\necho "ran $3"\n')
    done = bash(installed / "launch" / "local.sh", "mine.py", "my runs/mine", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^== (\d/4 \w+).*\n(?:.*\n)*?   done in \d+ s$", done.stdout, re.MULTILINE)
    assert steps == ["1/4 install", "2/4 prepare", "3/4 train", "4/4 evaluate"]
    assert re.findall(r"^ran fne_jax\.(\w+)$", done.stdout, re.MULTILINE) == [
        "prepare", "train", "evaluate"
    ]  # fmt: skip
    end = done.stdout[done.stdout.index("4/4 evaluate") :]
    for told in (
        "mine/report.html",
        "--logdir my\\ runs/mine",
        "fne_jax.search --workdir=my\\ runs/",
    ):
        assert told in end
    assert end.index("fne_jax.search") < end.index("fne_jax.review")
