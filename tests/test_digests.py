# SPDX-License-Identifier: Apache-2.0
"""Claims: a checkpoint that is not what was written is never used, the newest that is whole is, and
what is wrong is named; orbax alone would hand out other numbers."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from ip2p_jax import digests
from ip2p_jax.config import Checkpoint
from ip2p_jax.training import checkpoint

ITEMS = ("train", "ema")


def tree(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}


def save(manager: ocp.CheckpointManager, step: int) -> None:
    items = {name: ocp.args.StandardSave(tree(step)) for name in ITEMS}
    more = {name: ocp.args.JsonSave({"step": step}) for name in ("data", "config")}
    manager.save(step, args=ocp.args.Composite(**items, **more))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Three steps, as a run writes them."""
    folder = tmp_path_factory.mktemp("written")
    with checkpoint.open_manager(str(folder), Checkpoint(keep=3)) as manager:
        for step in (1, 2, 3):
            save(manager, step)
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def newest(run: Path) -> tuple[int, dict[int, str]]:
    return digests.newest(epath.Path(run / "checkpoints"), checkpoint.ITEMS)


def largest(run: Path, step: int, item: str = "train") -> Path:
    """The file that holds the parameters."""
    files = (run / "checkpoints" / str(step) / item).rglob("*")
    return max((x for x in files if x.is_file()), key=lambda x: x.stat().st_size)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def test_every_step_comes_with_its_digests(run):
    assert newest(run) == (3, {})
    assert not checkpoint.temporaries(epath.Path(run / "checkpoints"))


DAMAGE = {
    "flipped": lambda path: flip(path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("item", checkpoint.ITEMS)
def test_damage_is_named_and_the_step_before_is_used(run, kind, item):
    path = largest(run, 3, item)
    DAMAGE[kind](path)
    step, faults = newest(run)
    assert step == 2 and faults.keys() == {3}
    assert faults[3].startswith(path.relative_to(run / "checkpoints/3").as_posix())
    with pytest.raises(ValueError, match="no checkpoint is whole: in step 3 .*; in step 2 .*;"):
        for other in (1, 2):
            DAMAGE[kind](largest(run, other, item))
        newest(run)


def test_control_orbax_alone_hands_out_other_numbers(run):
    flip(largest(run, 3))
    with ocp.CheckpointManager(run / "checkpoints", item_names=ITEMS) as manager:
        target = ocp.args.Composite(train=ocp.args.StandardRestore(tree(0)))
        got = manager.restore(3, args=target)["train"]["w"]
    assert 0 < np.count_nonzero(got != tree(3)["w"]) < got.size


def test_what_is_not_read_is_not_compared(run):
    """Who only edits reads the EMA."""
    flip(largest(run, 3, "train"))
    assert digests.newest(epath.Path(run / "checkpoints"), ["ema"]) == (3, {})


def test_damaged_digests(run):
    (run / "checkpoints/3/digests.json").write_text("{")
    assert newest(run) == (2, {3: "digests.json is not JSON"})


def test_steps_older_than_digests_are_whole_if_they_are_complete(run):
    for step in (1, 2, 3):
        (run / "checkpoints" / str(step) / "digests.json").unlink()
    assert newest(run) == (3, {})
    largest(run, 3).write_bytes(b"")
    shutil.rmtree(run / "checkpoints/2/ema")
    step, faults = newest(run)
    assert step == 1 and faults[3].endswith(" is empty") and faults[2] == "ema/ is missing"


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        digests.newest(epath.Path(tmp_path / "checkpoints"), ITEMS)


def test_damaged_steps_are_set_aside(run):
    """So that their place is free, and that they are not counted among the newest that are kept."""
    flip(largest(run, 3))
    told: list[str] = []
    for _ in range(2):  # the second time there is one in its place
        shutil.copytree(run / "checkpoints/3", run / "copy", dirs_exist_ok=True)
        assert checkpoint.newest(str(run), told.append) == 2
        assert (run / "damaged/3/digests.json").exists()
        shutil.copytree(run / "copy", run / "checkpoints/3")
    assert told[0].startswith("step 3 is damaged (train/") and told[1] == "going on from step 2"


def test_strays_are_removed(run):
    """What a killed save left: ignored by who reads, removed by who writes."""
    stray = run / "checkpoints/4.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints/3", stray)
    assert newest(run) == (3, {}) and stray.exists()
    with checkpoint.open_manager(str(run), Checkpoint(keep=3)) as manager:
        assert not stray.exists()
        save(manager, 4)
    assert newest(run) == (4, {})
