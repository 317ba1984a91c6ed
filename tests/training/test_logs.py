# SPDX-License-Identifier: Apache-2.0
"""Claims: a line is the mean of its steps, each step is on one line, skipped ones are counted, and
too many of them, or parameters that are not finite, end the run."""

import contextlib
import json
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from ip2p_jax.config import Config, Log, Optim
from ip2p_jax.training import events, logs

CFG = Config(optim=Optim(max_skipped=3), log=Log(profile_at=2, profile_steps=1))


def metrics(value: float, **others) -> dict:
    named = {"loss": value, "grad_norm": 1.0, "param_norm": 2.0, "skipped": 0.0}
    return {n: jnp.array([x, 1.0]) for n, x in named.items()} | others


def lines(folder) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_weighted_means(tmp_path):
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        log.flush(8)  # nothing yet
        log.add(1, metrics(1.0, part=jnp.array([6.0, 3.0]), none=jnp.zeros(2)))
        log.add(2, metrics(3.0, part=jnp.array([0.0, 1.0]), none=jnp.zeros(2)))
        log.flush(8)
        log.add(3, metrics(5.0))
        log.flush(8)
    first, second = lines(tmp_path)
    assert first.pop("examples_per_second") > 0
    assert first.pop("data_seconds") == 0 and "model_flop_utilisation" not in first
    assert first == {"step": 2, "loss": 2.0, "grad_norm": 1.0, "param_norm": 2.0, "part": 1.5}
    assert second["step"] == 3 and second["loss"] == 5.0
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_saves_and_grids_are_no_steps(tmp_path, monkeypatch):
    """4 rows a step; steps take a second, what stands between them 100."""
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        for step in range(1, 5):
            now[0] += 1
            log.add(step, metrics(1.0))
            with log.paused():
                now[0] += 100
        log.flush(4)
    assert lines(tmp_path)[0]["examples_per_second"] == 4.0


def test_steps_that_compile_are_not_timed(tmp_path, monkeypatch):
    """4 rows a step: the first compiles for 100 seconds, as does the third, others take one."""
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        for step, compiles in enumerate((True, False, True, False), 1):
            with log.paused() if compiles else contextlib.nullcontext():
                now[0] += 100 * compiles
                log.add(step, metrics(1.0))
            now[0] += 1
        log.flush(4)
    assert lines(tmp_path)[0]["examples_per_second"] == 3 * 4 / 4


def test_steps_beyond_the_checkpoint_are_dropped(tmp_path):
    """What a killed run wrote after its last checkpoint, and the line it was writing."""
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        for step in range(1, 7):
            log.add(step, metrics(step))
            log.flush(1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with logs.open_logs(str(tmp_path), 4, CFG) as log:
        log.add(5, metrics(50))
        log.flush(1)
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 4, 50]


def test_every_host_drops_what_it_reported_beyond_the_checkpoint(tmp_path, monkeypatch):
    """Each has a file of its own; the others are left alone."""
    monkeypatch.setattr(logs.jax, "process_index", lambda: 1)
    for name in ("broken-0.jsonl", "broken-1.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 3)))
    with logs.open_logs(str(tmp_path), 2, CFG):
        pass
    left = {path.name: path.read_text().count("\n") for path in tmp_path.iterdir()}
    assert left == {"broken-0.jsonl": 3, "broken-1.jsonl": 2, "metrics.jsonl": 3}


def skipped() -> dict:
    """The metrics of a step that was not finite."""
    return {name: jnp.zeros(2) for name in metrics(1.0)} | {"skipped": jnp.ones(2)}


def test_lines_in_a_bucket_stay(monkeypatch):
    """There, to open a file for appending empties it."""
    file, held = epath.Path("gs://bucket/metrics.jsonl"), []
    monkeypatch.setattr(type(file), "exists", lambda path: bool(held))
    monkeypatch.setattr(type(file), "read_text", lambda path: held[-1])
    monkeypatch.setattr(type(file), "write_text", lambda path, text: held.append(text))
    monkeypatch.setattr(type(file), "open", None)
    for line in ("1\n", "2\n", "3\n"):
        logs.append(file, line)
    assert held == ["1\n", "1\n2\n", "1\n2\n3\n"]


def test_skipped_steps_are_counted(tmp_path, capsys):
    """They are in no mean; three in a row end the run, over lines and within one."""
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        for step in (1, 2, 3, 4, 5):
            log.add(step, metrics(float(step)) if step % 2 else skipped())
        log.flush(8)
        assert log.skipping == 0
        log.add(6, skipped())
        log.add(7, skipped())
        log.flush(8)
        assert log.skipping == 2
        log.add(8, skipped())
        log.add(9, metrics(1.0))
        with pytest.raises(FloatingPointError, match="steps 6 to 8: .*max_skipped=3"):
            log.flush(8)
    first, second = lines(tmp_path)
    assert (first["step"], first["loss"], first["skipped"]) == (5, 3.0, 2)
    assert (second["step"], second["skipped"]) == (7, 2) and "loss" not in second
    assert "not finite: steps 2, 4\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    with logs.open_logs(str(tmp_path), 2, CFG) as log:
        log.add(3, metrics(1.0))
        log.add(4, metrics(1.0, param_norm=jnp.array([value, 1.0])))
        with pytest.raises(FloatingPointError, match="step 4: the parameters are not finite"):
            log.flush(8)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_grid(tmp_path):
    red, blue = (np.full((2, 4, 6, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        log.grid(7, [red, blue, red])
    with Image.open(tmp_path / "samples/00000007.png") as image:
        assert image.size == (18, 8)
        row = np.asarray(image)[0, :, 0]
    np.testing.assert_array_equal(row, [255] * 6 + [0] * 6 + [255] * 6)


def test_what_a_step_waits_for_and_uses(tmp_path):
    """Data: the mean of its seconds over the steps of a line; FLOPs: those of the examples."""
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        log.flops_share = 0.25
        batches = (time.sleep(0.05) or i for i in range(2))
        for step in (1, 2):
            assert log.next(batches) == step - 1
            log.add(step, metrics(1.0))
        log.flush(8)
    [line] = lines(tmp_path)
    assert 0.05 <= line["data_seconds"] < 5
    assert line["model_flop_utilisation"] == pytest.approx(line["examples_per_second"] / 4)


def test_profile(tmp_path):
    """Recorded from step 2 on, for one step; one that is not over is ended with the run."""
    with logs.open_logs(str(tmp_path), 0, CFG) as log:
        for step in (1, 2, 3):
            log.profile(step)
            assert log.profiling == (step == 2)
            log.add(step, metrics(1.0))
        log.profile(2)
    assert not log.profiling
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_lines_go_to_the_board_too(tmp_path):
    sent = []
    board = SimpleNamespace(
        log=lambda x, step: sent.append((step, x)), finish=lambda: sent.append(0)
    )
    with logs.open_logs(str(tmp_path), 0, CFG, board=board) as log:
        log.add(1, metrics(1.0))
        log.flush(8)
        log.tell_of(1, {"validation_loss": 0.5})
    (step, line), validation, end = sent
    assert step == 1 and line["loss"] == 1.0 and "step" not in line
    assert validation == (1, {"validation_loss": 0.5}) and end == 0
    assert lines(tmp_path)[1] == {"step": 1, "validation_loss": 0.5}


def test_a_board_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="config.log.wandb=mine: needs `pip install wandb`"):
        events.open_board("mine", str(tmp_path), {})
    begun = {}
    module = SimpleNamespace(init=lambda **options: begun.update(options) or "run")
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert events.open_board("mine", str(tmp_path), {"seed": 1}) == "run"
    first = dict(begun)
    events.open_board("mine", str(tmp_path), {"seed": 1})
    assert begun == first and begun["project"] == "mine" and begun["resume"] == "allow"
    events.open_board("mine", str(tmp_path / "other"), {"seed": 1})
    assert begun["id"] != first["id"] and begun["dir"] == str(tmp_path / "other")
    events.open_board("mine", "gs://bucket/run", {})
    assert begun["dir"] is None
