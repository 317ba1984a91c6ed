# SPDX-License-Identifier: Apache-2.0
"""Claims: the samples that a run shows are the edits that the Editor makes, by seeds 0, 1, ...; no
timestep is left without weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ip2p_jax.config import Objective
from ip2p_jax.data.tokens import tokenize
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION, from_diffusers
from ip2p_jax.editor import Editor
from ip2p_jax.training.tasks.diffusion import score_of
from ip2p_jax.training.tasks.edit import edit_task
from ip2p_jax.training.tasks.task import given
from ip2p_jax.weights.load import ZERO_TERMINAL_SNR, Pretrained
from ip2p_jax.weights.names import Names
from tests.oracles import small_tokenizer
from tests.training import tiny

TEXTS = ["make it blue", "turn it round"]


@pytest.mark.parametrize("trained", [("unet",), ("unet", "text")])
def test_samples_are_edits(trained):
    """With the text tower frozen, and trained: then its EMA counts."""
    task, tokenizer, batch = tiny.tiny_task(), small_tokenizer(), tiny.batch(2)
    params = {**task.start.shapes, "vae": task.frozen["vae"]}
    ema = {part: params[part] for part in trained}
    frozen = {part: x for part, x in params.items() if part not in trained}
    task = edit_task(
        task.config,
        given(ema),
        frozen,
        tokenize(tokenizer, [""])[0],
        schedule=STABLE_DIFFUSION,
        objective=Objective(drop_rate=0.05),
        sample_steps=2,
        dtype=jnp.float32,
    )
    batch = batch._replace(tokens=tokenize(tokenizer, TEXTS))
    samples = np.asarray(jax.jit(task.sample)(ema, task.frozen, batch)).astype(int)

    editor = Editor(Pretrained(task.config, params, tokenizer, None, Names()), rows=2)
    pictures = [Image.fromarray(x) for x in batch.input]

    def edits(seeds: list[int]) -> np.ndarray:
        made = editor(pictures, TEXTS, steps=2, seed=seeds)
        return np.stack([np.asarray(x) for x in made]).astype(int)

    assert np.abs(samples - edits([0, 1])).max() <= 1
    assert np.abs(samples - edits([1, 0])).max() > 5  # control: other noise


def test_min_snr_weights_and_zero_terminal_snr():
    """Whether the configuration or the base model says that the last timestep is pure noise."""
    weighted = Objective(min_snr_gamma=5.0)
    pure = from_diffusers(ZERO_TERMINAL_SNR)
    with pytest.raises(ValueError, match="config.objective.min_snr_gamma is 5.0, expected 0: with"):
        score_of(pure, weighted, "none")
    score_of(pure, Objective(), "none")
    score_of(STABLE_DIFFUSION, weighted, "none")
