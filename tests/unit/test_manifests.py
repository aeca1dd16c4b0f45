"""The manifests for Kubernetes and SkyPilot: their fields, and what their scripts end with. No cluster runs them."""

import os
import signal
import subprocess
import time

import pytest
import yaml

from launchers import train
from tests.training import REPOSITORY

KUBERNETES = yaml.safe_load((REPOSITORY / "launchers/kubernetes/pytorchjob.yaml").read_text())
SKYPILOT = yaml.safe_load((REPOSITORY / "launchers/skypilot/train.yaml").read_text())
POD = KUBERNETES["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
(CONTAINER,) = POD["containers"]

# As far as they are used: kubeflow.org_pytorchjobs.yaml of training-operator v1, Kubernetes' PodSpec, SkyPilot's
# yaml-spec. A type, a table of fields, or [what each element is].
POD_SPEC = {
    "terminationGracePeriodSeconds": int,
    "containers": [
        {
            "name": str,
            "image": str,
            "workingDir": str,
            "env": [{"name": str, "value": str}],
            "command": [str],
            "args": [str],
            "resources": {"requests": {"cpu": str, "memory": str}, "limits": {"memory": str, "nvidia.com/gpu": int}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str, "sizeLimit": str}}
    ],
}
PYTORCH_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "elasticPolicy": {"rdzvBackend": str, "minReplicas": int, "maxReplicas": int, "maxRestarts": int},
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": str},
        "pytorchReplicaSpecs": {"Worker": {"replicas": int, "restartPolicy": str, "template": {"spec": POD_SPEC}}},
    },
}
BUCKET = {"name": str, "source": str, "mode": str}
TASK = {
    "name": str,
    "resources": {
        "accelerators": str,
        "use_spot": bool,
        "disk_size": int,
        "job_recovery": {"max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
    },
    "num_nodes": int,
    "envs": {"BUCKET": str, "DATA": str, "RECIPE": str},
    "workdir": str,
    "file_mounts": {"/runs": BUCKET, "/data": BUCKET},
    "setup": str,
    "run": str,
}


def misfits(found, schema, where="") -> list[str]:
    """The places of a document that its schema does not know, or knows as something else."""
    if isinstance(schema, dict) and isinstance(found, dict):
        unknown = [f"{where}.{key}: unknown" for key in found.keys() - schema.keys()]
        known = found.keys() & schema.keys()
        return unknown + [each for key in known for each in misfits(found[key], schema[key], f"{where}.{key}")]
    if isinstance(schema, list) and isinstance(found, list):
        return [each for i, value in enumerate(found) for each in misfits(value, schema[0], f"{where}[{i}]")]
    return [] if type(found) is schema else [f"{where}: {found!r} is no {schema}"]


@pytest.mark.parametrize("manifest, schema", [(KUBERNETES, PYTORCH_JOB), (SKYPILOT, TASK)], ids=["pod", "task"])
def test_fields_are_those_of_the_schema(manifest, schema):
    assert not misfits(manifest, schema)
    assert misfits({**manifest, "nodes": 2}, schema) == [".nodes: unknown"]


def test_numbers_that_have_to_agree():
    spec, variables = KUBERNETES["spec"], {each["name"]: each["value"] for each in CONTAINER["env"]}
    policy, pods = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
    assert policy["minReplicas"] == policy["maxReplicas"] == pods == int(variables["PODS"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in POD["volumes"]} and mounted["shm"] == "/dev/shm"
    assert variables["RUN_DIR"].startswith(f"{mounted['shared']}/")
    assert CONTAINER["name"] == "pytorch" and CONTAINER["command"] == ["bash", "-c"]
    assert spec["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
    assert SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"] == [128 + signal.SIGTERM]
    assert (REPOSITORY / SKYPILOT["envs"]["RECIPE"]).is_file() and (REPOSITORY / variables["RECIPE"]).is_file()
    assert subprocess.run(["bash", "-n", "-c", SKYPILOT["setup"]]).returncode == 0


# Stands in for python and torchrun. As the trainer it takes its arguments down, makes the checkpoint $MAKES, goes on
# until it is stopped and ends with $CODE.
STAND_IN = """#!/bin/bash
case "$*" in *--dry_run) echo "$WORLD_SIZE" >"$RUN_DIR.world"; exit "$REFUSED" ;; esac
echo "$@" >"$RUN_DIR.arguments"
[ "$MAKES" ] && mkdir -p "$RUN_DIR/checkpoints/$MAKES"
until [ "$AT_ONCE" ] || [ -e "$RUN_DIR/STOP" ]; do sleep 0.1; done
exit "$CODE"
"""
ORDERS = {
    "pod": (CONTAINER["args"][0], {"PODS": "2", "GPUS": "8", "HOSTNAME": "mdit-worker-0"}),
    "task": (SKYPILOT["run"], {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}),
}


@pytest.fixture(params=ORDERS)
def start(request, tmp_path):
    """-> a function that starts a manifest's script with stand-ins; then it has the run's directory."""
    script, variables = ORDERS[request.param]
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    script = script.replace("/runs/", f"{tmp_path}/").replace("PATH=$PWD/.venv/bin:$PATH", "")
    given = {"RECIPE": "configs/quickstart.toml", "RUN_DIR": str(tmp_path / "quickstart"), "CODE": "0", "REFUSED": "0"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    (tmp_path / "launchers").symlink_to(REPOSITORY / "launchers")
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "STOP").write_text("of the start before\n")

    def start(**more: str) -> subprocess.Popen:
        env = {**os.environ, **variables, **given, "PATH": path, "AT_ONCE": "", "MAKES": "", **more}
        start.process = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=env)
        return start.process

    start.run_dir, start.name = tmp_path / "quickstart", request.param
    yield start
    start.process.kill()
    start.process.wait()


def begun(start) -> list[str]:
    arguments, end = start.run_dir.with_suffix(".arguments"), time.monotonic() + 30
    while not (arguments.exists() and arguments.read_text().endswith("\n")):
        assert time.monotonic() < end and start.process.poll() is None, "the trainer has not begun"
        time.sleep(0.05)
    return arguments.read_text().split()


def test_told_to_end_it_is_to_go_on(start):
    process = start()
    command = begun(start)
    place = command.index("launchers/train.py")
    args = train.parse_arguments(command[place + 1 :])
    assert args.run_dir == start.run_dir and args.recipe.name == "quickstart.toml"
    assert command[:place][-2:] == ["--nproc_per_node", "8"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143 and (start.run_dir / "STOP").read_text() == "time is up\n"
    if start.name == "pod":
        assert start.run_dir.with_suffix(".world").read_text() == "16\n"


def test_stopped_by_a_person_it_has_ended(start):
    process = start()
    begun(start)
    (start.run_dir / "STOP").touch()
    assert process.wait(timeout=30) == 0


def test_finished_it_has_ended_whatever_an_earlier_stop_has_left(start):
    assert start(AT_ONCE="yes").wait(timeout=30) == 0


def test_what_fails_is_tried_again_where_it_has_come_further(start):
    assert start(AT_ONCE="yes", CODE="1").wait(timeout=30) == 1
    further = start(AT_ONCE="yes", CODE="1", MAKES="step_00000001").wait(timeout=30)
    assert further == {"pod": 143, "task": 1}[start.name]  # SkyPilot counts restarts itself
    if start.name == "pod":
        assert start(REFUSED="2").wait(timeout=30) == 2
