# SPDX-License-Identifier: Apache-2.0
"""launch/worker.py as the process that it is, with a training that is played: exit codes, the log
that is kept, SIGTERM, and the data that is fetched. Folders stand for buckets: both are epaths.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.world import ROOT, checkout


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts a host in `folder`, of the run in folder/run."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("IP2P_", "STUB_", "FAKE"))}
    mine |= {"IP2P_HOME": str(folder / "home"), "IP2P_KEEP": "0"} | environment
    command = [sys.executable, str(ROOT / "launch/worker.py"), f"--workdir={folder / 'run'}"]
    return subprocess.Popen(
        [*command, *arguments], cwd=checkout(), env=mine, text=True, stdout=-1, stderr=-1
    )


def end(worker: subprocess.Popen[str], folder: Path) -> tuple[int, str, str]:
    """Its exit code, which is written down too, and what it said."""
    out, error = worker.communicate(timeout=30)
    assert (folder / "home/exit").read_text() == f"exit {worker.returncode}\n"
    return worker.returncode, out, error


def kept(folder: Path) -> str:
    """The only log in the bucket."""
    [log] = (folder / "run/logs").iterdir()
    return log.read_text()


def test_finished(tmp_path: Path):
    """The training gets its options; the log is shown, and kept; the run is marked."""
    code, out, _ = end(start(tmp_path, "--", "--config=c.py", "--config.a=it's"), tmp_path)
    assert code == 0
    assert out == kept(tmp_path) == (tmp_path / "home/train.log").read_text()
    assert out.splitlines()[-1] == "step 5"
    assert (tmp_path / "run/state").read_text() == "finished\n"
    assert json.loads((tmp_path / "run/argv.json").read_text()) == [
        *("--distributed", "--config=c.py", "--config.a=it's", f"--workdir={tmp_path / 'run'}")
    ]


@pytest.mark.parametrize("code, seen", [(1, 1), (2, 2), (-signal.SIGKILL, 137)])
def test_failures_pass(tmp_path: Path, code: int, seen: int):
    assert end(start(tmp_path, STUB_CODE=str(code)), tmp_path)[0] == seen
    assert kept(tmp_path).splitlines()[-1] == "step 2"
    assert not (tmp_path / "run/state").exists()


def test_sigterm(tmp_path: Path):
    """It goes on to the training, whose 0 is not the end of the run: 75. The log is in the bucket
    while the training runs, and the next start goes on."""
    worker = start(tmp_path, STUB_SECONDS="0.5", STUB_STEPS="100")
    for _ in range(100):
        if (tmp_path / "run/logs").exists() and "step 1" in kept(tmp_path):
            break
        time.sleep(0.1)
    assert worker.poll() is None
    worker.terminate()
    code, out, _ = end(worker, tmp_path)
    assert (code, out.splitlines()[-1]) == (75, "SIGTERM: saved")
    assert not (tmp_path / "run/state").exists()
    code, out, _ = end(start(tmp_path, STUB_STEPS="5"), tmp_path)
    assert code == 0 and not out.startswith("going on from step 0")
    assert len(list((tmp_path / "run/logs").iterdir())) == 2


def test_a_bucket_that_takes_no_log(tmp_path: Path):
    """The training goes on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").write_text("")  # where the folder should be
    code, _, error = end(start(tmp_path), tmp_path)
    assert code == 0 and "FileExistsError" in error


def test_data(tmp_path: Path):
    """It is copied with its folders; what is there whole is not copied again."""
    source, copy = tmp_path / "shards", tmp_path / "home/data"
    (source / "pairs/1.0.0").mkdir(parents=True)
    (source / "manifest.json").write_text("{}")
    (source / "pairs/1.0.0/a").write_text("abc")
    (source / "pairs/1.0.0/b").write_text("def")
    copy.mkdir(parents=True)
    (copy / "pairs/1.0.0").mkdir(parents=True)
    (copy / "pairs/1.0.0/a").write_text("ABC")
    (copy / "pairs/1.0.0/b").write_text("d")  # cut short
    assert end(start(tmp_path, f"--data={source}"), tmp_path)[0] == 0
    assert f"--config.data.path={copy}" in (tmp_path / "run/argv.json").read_text()
    assert (copy / "manifest.json").read_text() == "{}"
    assert [(copy / "pairs/1.0.0" / name).read_text() for name in "ab"] == ["ABC", "def"]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--data=/nowhere"], "--data /nowhere: no manifest.json, not a data folder"),
        (["--date=x"], "unrecognized arguments: --date=x"),
    ],
)
def test_wrong_input(tmp_path: Path, arguments: list[str], line: str):
    code, out, error = end(start(tmp_path, *arguments), tmp_path)
    assert (code, out, error) == (2, "", f"error: {line}\n")
