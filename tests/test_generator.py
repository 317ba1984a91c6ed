# SPDX-License-Identifier: Apache-2.0
"""Pictures of texts equal diffusers' pipeline; rows do not touch; another VAE is diffusers' too."""

import shutil

import numpy as np
import pytest
from diffusers import AutoencoderKL, StableDiffusionPipeline

from ip2p_jax.generator import Generator
from tests.oracles import TINY_VAE, full_folder, randomize
from tests.pipelines import LATENTS, OPTIONS, PSNR, STEPS, Theirs, noise, psnr, relative

SQUARE, WIDE = (64, 64), (80, 48)
PROMPT = "a lighthouse on a rainy night"
NEGATIVE = "blurry, text"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def painted(
    theirs, start, sampler="ddim", steps=STEPS, prompt=PROMPT, negative="", s_t=7.5, **more
):
    """Their final latents and picture."""
    height, width = (theirs.pipe.vae_scale_factor * x for x in start.shape[1:3])
    return theirs(
        start,
        sampler,
        steps,
        prompt=prompt,
        negative_prompt=negative,
        guidance_scale=s_t,
        height=height,
        width=width,
        **more,
    )


def ours(
    generator, start, sampler="ddim", steps=STEPS, prompt=PROMPT, negative="", s_t=7.5, guided=None
):
    factor = generator.model.config.vae.factor
    size = (start.shape[2] * factor, start.shape[1] * factor)
    batch = generator.batch(
        start, size, prompts=[prompt], text_guidance=[s_t], seed=[0], negative=[negative]
    )
    made = generator.generate(batch, steps, sampler, guided)
    return made.latents, made.images[0]


@pytest.fixture(scope="module")
def theirs(tiny_sd):
    return Theirs(StableDiffusionPipeline, tiny_sd)


@pytest.fixture(scope="module")
def generator(tiny_sd):
    return Generator.from_pretrained(str(tiny_sd))


@pytest.mark.parity
@pytest.mark.parametrize(("size", "negative"), [(SQUARE, ""), (WIDE, NEGATIVE)])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_pictures_equal_diffusers(generator, theirs, sampler, size, negative):
    """Same start noise, 10 steps; square, and wide with a negative text."""
    start = noise(size)
    latents, picture = painted(theirs, start, sampler, negative=negative)
    our_latents, our_picture = ours(generator, start, sampler, negative=negative)
    assert our_picture.shape == (size[1], size[0], 3)
    assert relative(our_latents, latents) < LATENTS
    assert psnr(our_picture, picture) > PSNR


@pytest.mark.parity
def test_controls_are_seen(generator, theirs):
    """What is slightly wrong misses the tolerance by far: each on its own."""
    start = noise(SQUARE)
    latents, picture = painted(theirs, start)
    wrong = {
        "start scaled wrongly": ours(generator, start * 1.002),
        "guidance off by 0.1": ours(generator, start, s_t=7.6),
        "another prompt": ours(generator, start, prompt="a lighthouse on a rainy day"),
        "a negative text": ours(generator, start, negative=NEGATIVE),
        "another sampler's grid": ours(generator, start, "euler"),
    }
    for name, (our_latents, our_picture) in wrong.items():
        assert relative(our_latents, latents) > 5 * LATENTS, name
        assert psnr(our_picture, picture) < PSNR, name


@pytest.mark.parity
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_guidance_that_ends_early_is_diffusers(generator, theirs, sampler):
    """Guided for four of ten steps, as their callbacks have it; a step more or less is seen."""

    def end(pipe, i, t, tensors):
        if i == 3:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    start, sigmas = noise(SQUARE), generator.model.grid(sampler, STEPS).sigmas
    more = dict(callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    latents, picture = painted(theirs, start, sampler, **more)
    of_steps = {
        n: ours(generator, start, sampler, guided=(float(sigmas[n]), 1e9)) for n in (3, 4, 5)
    }
    assert relative(of_steps[4][0], latents) < LATENTS
    assert psnr(of_steps[4][1], picture) > PSNR
    assert min(relative(of_steps[n][0], latents) for n in (3, 5)) > 5 * LATENTS


@pytest.mark.parity
def test_control_step_offset(generator, theirs, monkeypatch):
    """Without `steps_offset` every step is one timestep off."""
    start = noise(SQUARE)
    monkeypatch.setitem(OPTIONS, "ddim", OPTIONS["ddim"] | {"steps_offset": 0})
    latents, _ = painted(theirs, start)
    assert relative(ours(generator, start)[0], latents) > 5 * LATENTS


@pytest.fixture(scope="module")
def bare_vae(tmp_path_factory):
    """A folder of a VAE alone, with a scaling factor of its own."""
    folder = tmp_path_factory.mktemp("vae")
    randomize(AutoencoderKL(**TINY_VAE, scaling_factor=0.3), 7).save_pretrained(folder)
    return folder


@pytest.mark.parity
def test_another_vae(tiny_sd, bare_vae, theirs, generator, monkeypatch):
    """The picture is what diffusers makes with that VAE; the latents are those of the UNet."""
    start = noise(SQUARE)
    monkeypatch.setattr(theirs.pipe, "vae", AutoencoderKL.from_pretrained(bare_vae).eval())
    latents, picture = painted(theirs, start)
    other = Generator.from_pretrained(str(tiny_sd), vae=str(bare_vae))
    our_latents, our_picture = ours(other, start)
    assert relative(our_latents, latents) < LATENTS
    assert psnr(our_picture, picture) > PSNR
    _, own = ours(generator, start)  # control: the model's own VAE
    assert psnr(own, picture) < 30


def test_rows_of_a_batch_do_not_touch(generator, monkeypatch):
    """A picture is the same whatever else is in its batch, bit for bit at equal numbers of rows."""
    monkeypatch.setattr(generator, "rows", 2)  # three pictures are two batches, of 2 and 1

    def make(*prompts, **options):
        made = generator(prompts, steps=STEPS, sampler="ddim", **options)
        return [np.asarray(x).astype(int) for x in made]

    a = make(
        "a", PROMPT, "b", text_guidance=[3.0, 7.5, 0.0], seed=[5, 6, 7], negative=["", "x", ""]
    )
    b = make("c", PROMPT, text_guidance=7.5, seed=[1, 6], negative=["y", "x"])
    [alone] = make(PROMPT, seed=6, negative="x")
    [last] = make("b", text_guidance=0.0, seed=7)
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[2], last)
    assert np.abs(a[1] - alone).max() <= 1
    assert np.abs(a[1] - a[0]).max() > 10


def test_one_program_per_shape_steps_and_sampler(generator):
    """Other texts, seeds, scales and the default size do not compile again; guidance may be 1."""
    ours(generator, noise(SQUARE))
    program = generator.program("ddim")
    before = len(program.compiled)
    options = dict(steps=STEPS, sampler="ddim", text_guidance=1.0)
    [plain] = generator(PROMPT, **options)
    [negative] = generator(PROMPT, negative=NEGATIVE, **options)
    assert len(program.compiled) == before
    # With a scale of 1 the lower branch has no say.
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(negative).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(sampler="plms"), "plms"),
        (dict(steps=1001), "1001"),
        (dict(text_guidance=float("nan")), "text_guidance"),
        (dict(seed=[1, 2]), "seed: 2 values for 1 pictures"),
        (dict(seed=2**32), "seed: 4294967296"),
        (dict(latents=np.zeros((2, 16, 16, 4), np.float32)), "latents: 2 rows for 1 pictures"),
        (dict(latents=np.zeros((1, 3, 3, 4), np.float32)), r"latents: shape \(1, 3, 3, 4\)"),
        (dict(size=(64, 50)), "size: 64x50, expected multiples of 16 px"),
        (dict(size=(0, 64)), "size: 0x64"),
        (dict(size=(64, 16384)), "up to 8192"),
    ],
)
def test_bad_arguments(generator, arguments, words):
    with pytest.raises(ValueError, match=words):
        generator(PROMPT, **{"steps": 1, "sampler": "ddim", **arguments})


def test_a_model_that_edits_is_refused(tiny_ip2p):
    with pytest.raises(ValueError, match="takes 8 channels.*this model is not text-to-image"):
        Generator.from_pretrained(str(tiny_ip2p))


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parity
def test_full_size_picture_equals_diffusers(tmp_path):
    """SD 1.5's shape, 256 px, ddim, 4 steps: final latents within 1e-3."""
    folder = full_folder(tmp_path / "sd", in_channels=4)
    start = noise((256, 256), factor=8)
    theirs = Theirs(StableDiffusionPipeline, folder)
    latents, picture = painted(theirs, start, steps=4)
    other, _ = painted(theirs, start, steps=4, s_t=7.6)
    del theirs
    our_latents, our_picture = ours(Generator.from_pretrained(str(folder)), start, steps=4)
    shutil.rmtree(folder)
    assert relative(our_latents, latents) < 1e-3
    assert psnr(our_picture, picture) > PSNR
    assert relative(our_latents, other) > 1e-3
