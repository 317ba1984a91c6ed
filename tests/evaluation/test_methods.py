# SPDX-License-Identifier: Apache-2.0
"""Claims: SDEdit equals diffusers' img2img, InstructPix2Pix the editor; an example has its noise.

img2img is given the mean of the picture's latent and our noise, for both draw theirs.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from PIL import Image

from ip2p_jax.editor import Editor
from ip2p_jax.evaluation.examples import Turn
from ip2p_jax.evaluation.methods import (
    InstructPix2Pix,
    Method,
    Recipe,
    Rows,
    SDEdit,
    Start,
    Values,
    example_keys,
    tail,
)
from ip2p_jax.placed import Placed, place
from ip2p_jax.weights.load import load
from tests.evaluation.test_clip_scores import photos
from tests.oracles import SCHEDULE
from tests.pipelines import LATENTS, OPTIONS, SCHEDULERS, STEPS, noise, relative

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

CAPTION = "a lighthouse on a rainy night"
SIDE = 32
STRENGTHS = (0.3, 0.6, 1.0)


@pytest.fixture(scope="module")
def generator(tiny_sd) -> Placed:
    return place(load(str(tiny_sd)))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return photos(SIDE, SIDE)[:1]


@pytest.fixture(scope="module")
def start(generator, image) -> Start:
    """Of one row, with a noise that both are given."""
    method = SDEdit(generator, Recipe(STEPS, "ddim"))
    rows = Rows(image, generator.tokenize([CAPTION]), *indices([0], [0]))
    encoded = jax.jit(method.encode)(generator.params, rows)
    return encoded._replace(noise=noise((SIDE, SIDE)))


def indices(index: list[int], turn: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(index, np.uint32), np.array(turn, np.uint32)


def values(*points: tuple[float, float]) -> Values:
    return Values(*np.array(points, np.float32).T)


def sampler_of(method: Method) -> Callable[[Start, Values, float], np.ndarray]:
    """Final latents, by a program that is traced once."""
    program = jax.jit(method.sample)

    def sample(start: Start, point: Values, other: float) -> np.ndarray:
        return np.asarray(program(method.model.params, start, point, method.grid(other)))

    return sample


class Theirs:
    """diffusers' img2img on torch."""

    def __init__(self, folder):
        scheduler = SCHEDULERS["ddim"](**SCHEDULE, **OPTIONS["ddim"])  # replaced at each call
        self.pipe: Any = StableDiffusionImg2ImgPipeline.from_pretrained(
            folder, scheduler=scheduler, safety_checker=None
        )
        self.pipe.set_progress_bar_config(disable=True)

    def latent(self, image: np.ndarray) -> torch.Tensor:
        """The mean, scaled."""
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            mean = self.pipe.vae.encode(pixels).latent_dist.mean
        return mean * self.pipe.vae.config.scaling_factor

    def __call__(self, image, start: np.ndarray, sampler: str, strength: float) -> np.ndarray:
        """Final latents."""
        self.pipe.scheduler = SCHEDULERS[sampler](**SCHEDULE, **OPTIONS.get(sampler, {}))
        given = torch.from_numpy(start).permute(0, 3, 1, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(img2img, "randn_tensor", lambda shape, **_: given.reshape(shape))
            latents = self.pipe(
                CAPTION,
                self.latent(image),
                strength,
                STEPS,
                guidance_scale=7.5,
                output_type="latent",
            ).images
        return latents.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def theirs(tiny_sd) -> Theirs:
    return Theirs(tiny_sd)


@pytest.mark.parity
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_sdedit_equals_diffusers(generator, theirs, image, start, sampler, strength):
    """Controls: a step more or less, noise that is a little stronger, another guidance."""
    method = SDEdit(generator, Recipe(STEPS, sampler))
    want = theirs(image, start.noise, sampler, strength)
    sample = sampler_of(method)
    ours = sample(start, values((7.5, strength)), strength)
    assert relative(ours, want) < LATENTS
    other = strength - 1 / STEPS + 1e-6
    assert relative(ours, theirs(image, start.noise, sampler, other)) > 5 * LATENTS
    for wrong, guidance in ((start._replace(noise=start.noise * 1.002), 7.5), (start, 7.6)):
        off = sample(wrong, values((guidance, strength)), strength)
        assert relative(off, want) > 5 * LATENTS


@pytest.mark.parity
def test_sdedit_starts_from_the_scaled_mean(generator, theirs, image, start):
    """Control: as the VAE has it, not scaled."""
    latent = theirs.latent(image).permute(0, 2, 3, 1).numpy()
    assert relative(np.asarray(start.latent), latent) < LATENTS
    unscaled = np.asarray(start.latent) / generator.config.vae.scaling_factor
    assert relative(unscaled, latent) > 1


def test_sdedit_edits_by_the_output_caption(generator):
    method = SDEdit(generator, Recipe(STEPS))
    assert method.text(Turn("make it night", "a street", "a street at night")).endswith("night")
    with pytest.raises(ValueError, match="SDEdit is given the output caption"):
        method.text(Turn("make it night", "a street"))


@pytest.mark.parametrize("steps", [10, 100])
def test_tail_keeps_as_many_steps_as_diffusers(generator, steps):
    whole = generator.grid("ddim", steps)
    for strength in (0.1, 0.29, 0.3, 0.7, 1.0):
        kept = tail(whole, strength)
        np.testing.assert_array_equal(kept.sigmas, whole.sigmas[-int(steps * strength) - 1 :])
        assert (kept.start, kept.end) == (1, whole.end)


@pytest.mark.parametrize(
    ("strength", "left"), [(0.0, 0), (0.05, 0), (-0.5, -5), (1.05, 10), (1.5, 15)]
)
def test_strengths_that_leave_nothing_or_too_much(generator, strength, left):
    words = f"strength {strength:g}: leaves {left} of 10 steps, expected over 0 and up to 1"
    with pytest.raises(ValueError, match=words):
        SDEdit(generator, Recipe(10)).grid(strength)


@pytest.mark.slow
def test_instruct_pix2pix_equals_the_editor(tiny_ip2p):
    """With the same noise and keys. Controls: another turn, other keys, another guidance."""
    editor = Editor.from_pretrained(str(tiny_ip2p))
    editor.rows = 2
    model, texts, pictures = editor.model, ["make it night", "add a bird"], photos(SIDE, SIDE)[:2]
    method = InstructPix2Pix(model, Recipe(3, "euler_ancestral", seed=4))
    assert [method.text(Turn(text, "x", "y")) for text in texts] == texts

    encode, sample = jax.jit(method.encode), sampler_of(method)

    def ours(turn: int, point: Values) -> tuple[Start, np.ndarray]:
        rows = Rows(pictures, model.tokenize(texts), *indices([5, 9], [turn, turn]))
        start = encode(model.params, rows)
        return start, sample(start, point, 1.5)

    point = values((7.5, 1.5), (5.0, 1.2))
    start, got = ours(0, point)
    batch = editor.batch(
        [Image.fromarray(picture) for picture in pictures],
        np.asarray(start.noise),
        instructions=texts,
        text_guidance=point.text_guidance.tolist(),
        image_guidance=point.other.tolist(),
        seed=[0, 0],
        negative=["", ""],
    )
    batch = batch._replace(text=batch.text._replace(keys=start.keys))
    want = editor.edit(batch, 3, "euler_ancestral").latents
    assert relative(got, want) < 1e-5
    for _, wrong in (ours(1, point), ours(0, values((7.6, 1.5), (5, 1.2)))):
        assert relative(wrong, want) > 5 * LATENTS
    keys = jax.random.split(jax.random.key(4), 2)
    wrong = sample(start._replace(keys=keys), point, 1.5)
    assert relative(wrong, want) > 5 * LATENTS


def test_keys_depend_on_seed_example_and_turn_alone():
    """All are different, and the same in whatever order and beside whatever they are asked for."""
    grid = [(index, turn) for index in (0, 1, 7, 2**31) for turn in (0, 1, 2)]

    def keys(seed: int, wanted: list[tuple[int, int]]) -> dict[tuple, bytes]:
        at = [list(x) for x in zip(*wanted, strict=True)]
        blank = np.zeros((len(wanted), 8, 8, 3), np.uint8)
        rows = Rows(blank, np.zeros((len(wanted), 4), np.int32), *indices(*at))
        data = [np.asarray(jax.random.key_data(k)) for k in example_keys(seed, rows)]
        return {(seed, *x, i): data[i][n].tobytes() for i in (0, 1) for n, x in enumerate(wanted)}

    every = keys(0, grid) | keys(1, grid)
    assert len(set(every.values())) == len(every) == 48
    for wanted in (grid[::-1], grid[4:6]):
        some = keys(0, wanted)
        assert some == {name: every[name] for name in some}
