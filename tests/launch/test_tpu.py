# SPDX-License-Identifier: Apache-2.0
"""launch/tpu.sh against a gcloud that is played: the order and the arguments of its calls, what it
does after a preemption and other ends of a run, that it gives up, and what it refuses.

Each run also checks that all flags are documented ones and that nothing in a bucket is deleted.
"""

import shlex
from pathlib import Path

import pytest

from tests.launch.world import PLACE, World

DONE = "ACTIVE READY exit:0 finished"  # while it is being looked at
LIVE = "ACTIVE READY idle -"
COMMANDS = ("up", "create", "setup", "run", "watch", "resume", "log", "delete", "jobset")


def alive(folder: Path, *lives: list[str]) -> World:
    """A world in whose first life the slice is."""
    world = World(folder, *lives)
    (world.fake / "life").write_text("1\n")
    (world.fake / "count").write_text("1\n")
    (world.fake / "looks").write_text("-1\n")
    (world.fake / "gs/bucket/runs/edits/code.tar.gz").touch()
    return world


def test_up(tmp_path: Path):
    """Everything in its order, with the arguments it should have."""
    world = World(tmp_path, ["WAITING_FOR_RESOURCES - - -", "PROVISIONING - - -", LIVE, DONE])
    done = world.tpu("up", "--spot", "--data=gs://bucket/shards", "--", "--config.a=it's")
    assert done.returncode == 0, done.stderr
    assert world.deeds == ["create", "send", "install", "run"]
    create, *_ = world.calls
    assert create == [
        *("compute", "tpus", "queued-resources", "create", "edits", "--node-id=edits"),
        *("--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base", "--spot"),
        *("--zone=us-central2-b", "--quiet"),
    ]
    [sent] = [call for call in world.calls if call[:2] == ["storage", "cp"] and "-" not in call]
    assert sent[3] == "gs://bucket/runs/edits/code.tar.gz"
    install, run = [call for call in world.calls if "--worker=all" in call]
    assert "gs://bucket/runs/edits/code.tar.gz" in install[-3]
    words = shlex.split(run[-3].removeprefix("--command="))
    ours = words[words.index("launch/worker.py") + 1 : words.index("</dev/null")]
    assert ours == [
        *("--workdir=gs://bucket/runs/edits", "--data=gs://bucket/shards", "--"),
        *("--config=configs/tpu_v4.py", "--config.a=it's"),
    ]
    started = world.calls.index(run)
    assert world.calls[started - 1][:4] == ["storage", "cp", "-", "gs://bucket/runs/edits/state"]
    for seen in ("WAITING_FOR_RESOURCES", "PROVISIONING", "is finished: gs://bucket/runs/edits"):
        assert done.stderr.count(seen) == 1


@pytest.mark.parametrize(
    "end",
    [
        ["SUSPENDING - - -", "SUSPENDED - - -"],
        ["ACTIVE PREEMPTED - -"],
        ["FAILED - - -"],
    ],
)
def test_preemption(tmp_path: Path, end: list[str]):
    """The dead slice is deleted, then created again, set up with the same code, and started."""
    again = ["WAITING_FOR_RESOURCES - - -", LIVE, "ACTIVE READY running 2000", DONE]
    world = alive(tmp_path, ["ACTIVE READY running 1000", *end], again)
    done = world.tpu("watch", "--spot", "--", "--config.optim.lr=1")
    assert done.returncode == 0, done.stderr
    assert world.deeds == ["delete", "create", "install", "run"]
    assert ["delete", "edits", "--force"] in [call[3:6] for call in world.calls]
    assert any("--spot" in call for call in world.calls if "create" in call)
    assert any("--config.optim.lr=1" in call[-3] for call in world.calls if "ssh" in call)
    assert "step 2000 is saved" in done.stderr and done.stderr.count("restart 1 since") == 1


@pytest.mark.parametrize("end", ["exit:1", "exit:75", "idle"])
def test_training_ends(tmp_path: Path, end: str):
    """Where the slice lives and the training does not, it is installed and started again."""
    lines = ["ACTIVE READY running 10", f"ACTIVE READY {end} -", f"ACTIVE READY {end} -"]
    world = alive(tmp_path, [*lines, LIVE, DONE])
    assert world.tpu("watch").returncode == 0
    assert world.deeds == ["install", "run"]


def test_wrong_input_of_the_training(tmp_path: Path):
    world = alive(tmp_path, ["ACTIVE READY exit:2 -"])
    done = world.tpu("watch")
    assert (done.returncode, world.deeds) == (1, [])
    assert "error: the training refuses its input" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("state", ["error - - -", "ACTIVE READY silent -", "ACTIVE REPAIRING - -"])
def test_nothing_is_done_without_an_answer(tmp_path: Path, state: str):
    """No network, a host that does not answer, one that is being repaired: it waits."""
    world = alive(tmp_path, [state, state, state, DONE])
    assert world.tpu("watch").returncode == 0
    assert world.deeds == []


def test_deleted_by_hand(tmp_path: Path):
    """`watch` does not create what somebody deleted; `resume` does."""
    world = World(tmp_path, [LIVE])
    (world.fake / "gs/bucket/runs/edits/code.tar.gz").touch()
    done = world.tpu("watch")
    assert (done.returncode, world.deeds) == (1, [])
    assert done.stderr.endswith("error: edits has been deleted; resume makes it again\n")
    assert world.tpu("resume").returncode == 0
    assert world.deeds == ["create", "install", "run"]


def test_resume_leaves_what_runs_alone(tmp_path: Path):
    world = alive(tmp_path, ["ACTIVE READY running -"])
    assert world.tpu("resume").returncode == 0
    assert world.deeds == []


def test_gives_up(tmp_path: Path):
    """Restarts in a row wait for longer and longer, up to 15 minutes, and are bounded."""
    world = alive(tmp_path, *[["FAILED - - -"]] * 6)
    (world.tools / "sleep").write_text('#!/bin/sh\necho "$1" >> "$FAKE/sleeps"\n')
    (world.tools / "sleep").chmod(0o755)
    done = world.tpu("watch", "--restarts=5", IP2P_POLL="1", IP2P_BACKOFF="200")
    assert done.returncode == 1
    assert done.stderr.endswith("gave up after 5 restarts without a new checkpoint\n")
    assert world.deeds == ["delete", "create"] * 5
    waits = (world.fake / "sleeps").read_text().split()
    assert [x for x in waits if x != "1"] == ["200", "400", "800", "900"]
    assert waits.count("1") == 5  # one after each restart


def test_progress_starts_the_count_anew(tmp_path: Path):
    """With one restart allowed, two are made, for each time there was a newer checkpoint."""
    lives = [[LIVE, f"ACTIVE READY running {step}", "SUSPENDED - - -"] for step in (1, 2)]
    world = alive(tmp_path, *lives, [LIVE, DONE])
    assert world.tpu("watch", "--restarts=1", IP2P_BACKOFF="9999").returncode == 0
    assert world.deeds == ["delete", "create", "install", "run"] * 2


def test_no_quota(tmp_path: Path):
    """gcloud's own error and exit code where there is nothing to repeat."""
    world = World(tmp_path)
    done = world.tpu("up")
    assert (done.returncode, done.stderr) == (1, "ERROR: there is no quota\n")
    assert world.deeds == ["create"]


def test_no_quota_any_more(tmp_path: Path):
    """A slice that was deleted for its next life, for which there is none: that is tried again."""
    world = alive(tmp_path, ["SUSPENDED - - -"])
    done = world.tpu("watch", "--restarts=2")
    assert done.returncode == 1
    assert done.stderr.endswith("gave up after 2 restarts without a new checkpoint\n")
    assert world.deeds == ["delete", "create", "create"]


def test_delete(tmp_path: Path):
    """By hand, or when the run is finished."""
    world = alive(tmp_path, [DONE])
    assert world.tpu("delete", IP2P_BUCKET="", IP2P_TYPE="").returncode == 0
    [call] = world.calls
    assert call[2:6] == ["queued-resources", "delete", "edits", "--force"]
    (tmp_path / "b").mkdir()
    world = alive(tmp_path / "b", [DONE])
    assert world.tpu("watch", "--delete").returncode == 0
    assert world.deeds == ["delete"]


def test_options_and_environment_are_alike(tmp_path: Path):
    world = World(tmp_path, [LIVE])
    options = [f"--{k.lower()}={v}" for k, v in PLACE.items()]
    more = {"IP2P_CREATE": "--network=n --internal-ips"}
    empty = dict.fromkeys(world.environment, "")
    world.tpu("create", *options, "--project", "p", "--spot", **empty | more)
    (world.fake / "life").write_text("0\n")
    world.tpu("create", IP2P_PROJECT="p", IP2P_SPOT="1", **more)
    first, second = world.calls
    assert first == second
    assert {"--network=n", "--internal-ips", "--project=p"} <= set(first)


@pytest.mark.parametrize(
    "type_, name, runtime",
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_types(tmp_path: Path, type_: str, name: str, runtime: str):
    """Google's name of each type, and the software that it recommends for it."""
    world = World(tmp_path, [LIVE])
    world.tpu("create", "--type", type_)
    [call] = world.calls
    assert {f"--accelerator-type={name}", f"--runtime-version={runtime}"} <= set(call)


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run(tmp_path: Path, command: str):
    """Prints what would be done, as one could type it, and does nothing."""
    world = World(tmp_path, [LIVE])
    done = world.tpu(command, "--dry-run", "--image=i", "--", "--config.a=it's")
    assert (done.returncode, done.stderr, world.calls) == (0, "", [])
    if command != "jobset":
        lines = [x for x in done.stdout.splitlines() if not x.startswith("#")]
        first = {shlex.split(line)[0] for line in lines}
        assert first <= {"gcloud", "git", "echo"}
    deeds = {
        "up": ["queued-resources create", "worker.py", "queued-resources delete"],
        "resume": ["queued-resources delete", "queued-resources create", "install.sh", "worker.py"],
    }
    found = [done.stdout.index(deed) for deed in deeds.get(command, [])]
    assert found == sorted(found)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["watch", "--help"], []])
def test_help(tmp_path: Path, arguments: list[str]):
    done = World(tmp_path).tpu(*arguments)
    assert done.returncode == 0
    for word in (*COMMANDS, "IP2P_POLL", "IP2P_BACKOFF", "--spot", "launch/tpu.sh up --name"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["start"], "start: expected up, create, setup, run, watch, resume, log, delete or jobset"),
        (["up", "--nme=a"], "--nme: expected a command and its options, see --help"),
        (["up", "name"], "name: expected a command and its options, see --help"),
        (["up", "--name"], "--name: expected a value"),
        (["up", "--name="], "--name is missing, expected up to 40 of a-z, 0-9 and -"),
        (["up", "--name=Edits"], "--name Edits: expected up to 40 of a-z, 0-9 and -"),
        (["up", "--zone=us"], "--zone us: expected a zone, such as us-central2-b"),
        (["up", "--type=h100"], "--type h100: expected a type of TPU, such as v4-32 or v5e-16"),
        (["up", "--bucket=bucket"], "--bucket bucket: expected gs://BUCKET or gs://BUCKET/FOLDER"),
        (["up", "--bucket=gs://b b"], "--bucket gs://b b: expected gs://BUCKET"),
        (["up", "--data=shards"], "--data shards: expected gs://BUCKET/FOLDER"),
        (["up", "--config=none.py"], "--config none.py: no such file in "),
        (["up", "--config=a;b"], "--config a;b: expected a file"),
        (["up", "--restarts=many"], "--restarts many: expected a number"),
        (["jobset"], "--image is missing, expected a container image"),
        (["jobset", "--image=i", "--type=v3-8"], "--type v3-8: expected v4, v5e, v5p or v6e"),
        (["jobset", "--image=i", "--type=v4-24"], "--type v4-24: expected 4, 8, 16, ... 512 chips"),
    ],
)
def test_wrong_input(tmp_path: Path, arguments: list[str], line: str):
    """One line that names the option, exit code 2, nothing called."""
    world = World(tmp_path)
    done = world.tpu(*arguments)
    assert (done.returncode, done.stdout, world.calls) == (2, "", [])
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name, value", [("POLL", "soon"), ("BACKOFF", "1.5"), ("SPOT", "yes")])
def test_wrong_environment(tmp_path: Path, name: str, value: str):
    done = World(tmp_path).tpu("watch", **{f"IP2P_{name}": value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: IP2P_{name}") and done.stderr.count("\n") == 1


def test_there_is_no_gcloud(tmp_path: Path):
    world = World(tmp_path)
    (world.tools / "gcloud").unlink()
    for tool in ("bash", "dirname", "env"):
        (world.tools / tool).symlink_to(f"/usr/bin/{tool}")
    done = world.tpu("up", PATH=str(world.tools))
    assert done.returncode == 2
    assert done.stderr.startswith("error: gcloud: not found")


def test_whole(tmp_path: Path):
    """With a host that does what it is told: a training is started, preempted in the middle, and
    finished by another host from the last step that was saved; its output is in the bucket."""
    world = World(tmp_path, [LIVE], [LIVE], host=True)
    done = world.tpu("up", "--spot", IP2P_POLL="0.2")
    assert done.returncode == 0, done.stderr
    assert world.deeds == ["create", "send", "install", "run", "delete", "create", "install", "run"]
    run = world.fake / "gs/bucket/runs/edits"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == list("12345")
    [log] = [path.read_text() for path in (run / "logs").iterdir() if "step 5" in path.read_text()]
    assert log.splitlines() == ["going on from step 3", "step 4", "step 5"]
    assert (run / "state").read_text() == "finished\n"
    assert (world.fake / "host/ip2p/exit").read_text() == "exit 0\n"
