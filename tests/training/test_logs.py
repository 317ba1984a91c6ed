# SPDX-License-Identifier: Apache-2.0
"""Claims: a line is the mean of its steps, each step is on one line, nothing that is not finite
passes."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ip2p_jax.training import logs


def metrics(value: float, **others) -> dict:
    named = {"loss": value, "grad_norm": 1.0, "param_norm": 2.0}
    return {n: jnp.array([x, 1.0]) for n, x in named.items()} | others


def lines(folder) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_weighted_means(tmp_path):
    with logs.open_logs(str(tmp_path), 0, 10) as log:
        log.flush(8)  # nothing yet
        log.add(1, metrics(1.0, part=jnp.array([6.0, 3.0]), none=jnp.zeros(2)))
        log.add(2, metrics(3.0, part=jnp.array([0.0, 1.0]), none=jnp.zeros(2)))
        log.flush(8)
        log.add(3, metrics(5.0))
        log.flush(8)
    first, second = lines(tmp_path)
    assert first.pop("examples_per_second") > 0
    assert first == {"step": 2, "loss": 2.0, "grad_norm": 1.0, "param_norm": 2.0, "part": 1.5}
    assert second["step"] == 3 and second["loss"] == 5.0
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_saves_and_grids_are_no_steps(tmp_path, monkeypatch):
    """4 rows a step; steps take a second, what stands between them 100."""
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with logs.open_logs(str(tmp_path), 0, 10) as log:
        for step in range(1, 5):
            now[0] += 1
            log.add(step, metrics(1.0))
            with log.paused():
                now[0] += 100
        log.flush(4)
    assert lines(tmp_path)[0]["examples_per_second"] == 4.0


def test_steps_beyond_the_checkpoint_are_dropped(tmp_path):
    """What a killed run wrote after its last checkpoint, and the line it was writing."""
    with logs.open_logs(str(tmp_path), 0, 10) as log:
        for step in range(1, 7):
            log.add(step, metrics(step))
            log.flush(1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with logs.open_logs(str(tmp_path), 4, 10) as log:
        log.add(5, metrics(50))
        log.flush(1)
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 4, 50]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, name, value):
    with logs.open_logs(str(tmp_path), 2, 10) as log:
        log.add(3, metrics(1.0))
        log.add(4, metrics(1.0, **{name: jnp.array([value, 1.0])}))
        log.add(5, metrics(np.nan))
        with pytest.raises(FloatingPointError, match=f"step 4: {name} is {value}"):
            log.flush(8)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_grid(tmp_path):
    red, blue = (np.full((2, 4, 6, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    with logs.open_logs(str(tmp_path), 0, 10) as log:
        log.grid(7, [red, blue, red])
    with Image.open(tmp_path / "samples/00000007.png") as image:
        assert image.size == (18, 8)
        row = np.asarray(image)[0, :, 0]
    np.testing.assert_array_equal(row, [255] * 6 + [0] * 6 + [255] * 6)
