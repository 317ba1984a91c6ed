# SPDX-License-Identifier: Apache-2.0
"""launch/gke/jobset.yaml, filled in, and launch/sky.yaml against schemas of what takes them, and
against what the rest of launch/ says; each schema refuses what it should.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.launch.schemas import JOBSET, TASK
from tests.launch.world import ROOT, World

IMAGE = "europe-docker.pkg.dev/project/repository/ip2p:1"
AWKWARD = '--config.a=it\'s "x" \\ $HOME ${NAME} & #'


def jobset(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    done = World(folder).tpu("jobset", f"--image={IMAGE}", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return yaml.safe_load(done.stdout)


def job(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_jobset(tmp_path: Path):
    """JobSet takes it; the container gets its arguments as they were typed."""
    data = "gs://bucket/shards"
    document = jobset(tmp_path, f"--data={data}", "--restarts=7", "--spot", "--", AWKWARD)
    jsonschema.validate(document, JOBSET)
    pod = job(document)["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == IMAGE
    assert container["args"] == [
        *("--workdir=gs://bucket/runs/edits", f"--data={data}", "--"),
        *("--config=configs/tpu_v4.py", AWKWARD),
    ]
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 7
    [rule] = job(document)["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it


@pytest.mark.parametrize(
    "type_, label, topology, hosts",
    [
        ("v4-8", "tpu-v4-podslice", "2x2x1", 1),
        ("v4-512", "tpu-v4-podslice", "4x8x8", 64),
        ("v5p-32", "tpu-v5p-slice", "2x2x4", 4),
        ("v5e-16", "tpu-v5-lite-podslice", "4x4", 4),
        ("v6e-256", "tpu-v6e-slice", "16x16", 64),
    ],
)
def test_slices(tmp_path: Path, type_: str, label: str, topology: str, hosts: int):
    """Node pools of each type: labels and arrangements as GKE and xpk name them, 4 chips a host."""
    document = jobset(tmp_path, f"--type={type_}")
    jsonschema.validate(document, JOBSET)
    selector = job(document)["template"]["spec"]["nodeSelector"]
    assert selector == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert job(document)["parallelism"] == job(document)["completions"] == hosts


def test_names_stay_texts(tmp_path: Path):
    """What YAML would read as something else than a text."""
    document = jobset(tmp_path, "--account=12345", IP2P_NAME="null", IP2P_ZONE="")
    jsonschema.validate(document, JOBSET)
    assert document["metadata"]["name"] == "null"


def test_sky(tmp_path: Path):
    """SkyPilot takes it; its commands call worker.py with the options that it has."""
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    jsonschema.validate(task, TASK)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    python = tmp_path / "ip2p/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor x; do echo "$x"; done\n')
    python.chmod(0o755)
    mine = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | task["envs"]
    mine |= {"WORKDIR": "gs://b/r", "OPTIONS": "--config.a=1 --config.b=2"}
    for data, more in (("", []), ("gs://b/my shards", ["--data=gs://b/my shards"])):
        done = subprocess.check_output(
            ["bash", "-euc", task["run"]], env=mine | {"DATA": data}, text=True
        )
        assert done.splitlines() == [
            *("launch/worker.py", "--workdir=gs://b/r", *more, "--", "--config=configs/tpu_v4.py"),
            *("--config.a=1", "--config.b=2"),
        ]
    assert (ROOT / task["setup"].split()[1]).exists()


@pytest.mark.parametrize(
    "where, wrong",
    [
        ("/spec/replicatedJobs/0/template/spec/completions", "4"),
        ("/spec/replicatedJobs/0/template/spec/template/spec/containers/0/arg", []),
        ("/spec/failurePolicy/rules/0/action", "Fail"),
        ("/spec/replicatedJob", []),
        ("/metadata/name", "Edits"),
    ],
)
def test_the_schema_refuses(tmp_path: Path, where: str, wrong: Any):
    document = jobset(tmp_path)
    place = document
    *path, last = where.split("/")[1:]
    for step in path:
        place = place[int(step) if step.isdecimal() else step]
    place[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, JOBSET)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"resource": {}}, TASK)


def test_what_the_readme_says():
    """Its files are there, and its commands have options that exist."""
    text = (ROOT / "launch/README.md").read_text()
    for name in re.findall(r"launch/[a-z]+(?:/[A-Za-z]+)?\.?[a-z]*", text):
        assert (ROOT / name).exists(), name
    usage = (ROOT / "launch/tpu.sh").read_text()
    for line in re.findall(r"launch/tpu\.sh .*", text):
        for option in re.findall(r"--[a-z-]+(?=[ =]|$)", line.split(" -- ")[0]):
            assert f"  {option}" in usage, line
