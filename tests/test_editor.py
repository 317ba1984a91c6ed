# SPDX-License-Identifier: Apache-2.0
"""Whole edits equal diffusers' pipeline; the rows of a batch do not touch each other."""

import uuid

import jax
import numpy as np
import pytest
import skimage.data
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from ip2p_jax import programs
from ip2p_jax.editor import Editor
from ip2p_jax.models import attention
from ip2p_jax.sizes import edit_size, fit
from ip2p_jax.weights.load import load
from tests.pipelines import (
    LATENTS,
    OPTIONS,
    PSNR,
    SCHEDULERS,
    STEPS,
    Theirs,
    noise,
    psnr,
    relative,
)

INSTRUCTION = "make it look like a rainy night"


def photo(name: str, resolution: int = 64, multiple: int = 16) -> Image.Image:
    image = Image.fromarray(getattr(skimage.data, name)())
    return fit(image, edit_size(image.size, resolution, multiple))


def edited(theirs, image, start, sampler="ddim", steps=STEPS, s_i=1.5):
    """Their final latents and picture."""
    scales = dict(guidance_scale=7.5, image_guidance_scale=s_i)
    return theirs(start, sampler, steps, prompt=INSTRUCTION, image=image, **scales)


def ours(editor, image, start, sampler="ddim", steps=STEPS, instruction=INSTRUCTION, s_i=1.5):
    batch = editor.batch(
        [image],
        start,
        instructions=[instruction],
        text_guidance=[7.5],
        image_guidance=[s_i],
        seed=[0],
        negative=[""],
    )
    edited = editor.edit(batch, steps, sampler)
    return edited.latents, edited.images[0]


@pytest.fixture(scope="module")
def theirs(tiny_ip2p):
    return Theirs(StableDiffusionInstructPix2PixPipeline, tiny_ip2p)


@pytest.fixture(scope="module")
def editor(tiny_ip2p):
    return Editor.from_pretrained(str(tiny_ip2p))


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_edit_equals_diffusers(editor, theirs, name, sampler):
    """Same start noise, 10 steps, a square photograph and one that is not."""
    image = photo(name)
    start = noise(image.size)
    latents, picture = edited(theirs, image, start, sampler)
    our_latents, our_picture = ours(editor, image, start, sampler)
    assert relative(our_latents, latents) < LATENTS
    assert psnr(our_picture, picture) > PSNR


@pytest.fixture(scope="module")
def reference(theirs):
    image = photo("coffee")
    start = noise(image.size)
    return image, start, *edited(theirs, image, start)


@pytest.mark.parity
def test_controls_are_seen(editor, reference):
    """What is slightly wrong misses the tolerance by far: each on its own."""
    image, start, latents, picture = reference
    wrong = {
        "start scaled wrongly": ours(editor, image, start * 1.002),
        "image guidance off by 0.1": ours(editor, image, start, s_i=1.6),
        "another instruction": ours(editor, image, start, instruction="make it a rainy night"),
        "another sampler's grid": ours(editor, image, start, "euler"),
    }
    for name, (our_latents, our_picture) in wrong.items():
        assert relative(our_latents, latents) > 5 * LATENTS, name
        assert psnr(our_picture, picture) < PSNR, name


@pytest.mark.parity
def test_control_step_offset(editor, theirs, reference, monkeypatch):
    """Without `steps_offset` every step is one timestep off."""
    image, start, _, _ = reference
    monkeypatch.setitem(OPTIONS, "ddim", OPTIONS["ddim"] | {"steps_offset": 0})
    latents, _ = edited(theirs, image, start)
    assert relative(ours(editor, image, start)[0], latents) > 5 * LATENTS


@pytest.mark.parity
def test_control_gelu(tiny_ip2p, reference, monkeypatch):
    """The tanh form of the GELU in GEGLU is another network."""
    image, start, latents, _ = reference
    monkeypatch.setattr(attention, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    monkeypatch.setattr(programs, "surroundings", lambda: str(uuid.uuid4()))
    other = Editor.from_pretrained(str(tiny_ip2p))
    assert relative(ours(other, image, start)[0], latents) > LATENTS


def test_rows_of_a_batch_do_not_touch(editor, monkeypatch):
    """A picture is the same whatever else is in its batch, bit for bit at equal numbers of rows."""
    a, b, c = photo("astronaut"), photo("rocket"), photo("chelsea")
    monkeypatch.setattr(editor, "rows", 4)
    options = dict(steps=4, resolution=64, sampler="euler_ancestral")
    square = [x.resize((64, 64)) for x in (a, b, c)]
    mixed = editor(
        square,
        ["x", "make it blue", "y"],
        text_guidance=[3.0, 7.5, 0.0],
        image_guidance=[1.0, 0.5, -1.0],
        seed=[5, 6, 7],
        negative=["", "bad", "worse"],
        **options,
    )
    others = editor(
        [square[2], square[1], square[0]],
        ["other", "make it blue", "text"],
        text_guidance=[9.0, 7.5, 1.0],
        image_guidance=[2.0, 0.5, 1.5],
        seed=[1, 6, 2],
        negative=["", "bad", ""],
        **options,
    )
    alone = editor(
        [square[1]],
        ["make it blue"],
        text_guidance=7.5,
        image_guidance=0.5,
        seed=6,
        negative="bad",
        **options,
    )
    middle = np.asarray(mixed[1])
    np.testing.assert_array_equal(middle, np.asarray(others[1]))
    assert np.abs(middle.astype(int) - np.asarray(alone[0]).astype(int)).max() <= 1
    assert np.abs(middle.astype(int) - np.asarray(mixed[0]).astype(int)).max() > 10


@pytest.mark.slow
def test_batch_over_devices(tiny_ip2p, editor):
    """Five pictures on eight devices: the padding does not leak, and one device gives the same."""
    images = [photo("astronaut").rotate(90 * i) for i in range(5)]
    instructions = [f"edit number {i}" for i in range(5)]
    spread = Editor(load(str(tiny_ip2p)), devices=jax.devices())
    options = dict(steps=4, sampler="ddim", seed=[1, 2, 3, 4, 5])
    many = spread(images, instructions, **options)
    single = editor(images, instructions, **options)
    assert len(many) == 5
    for x, y in zip(many, single, strict=True):
        assert np.abs(np.asarray(x).astype(int) - np.asarray(y).astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_few_pictures_on_many_devices(tiny_ip2p, editor, n):
    """Each of eight devices computes one branch of one picture's three, or of two pictures' six;
    the pictures are those of one device."""
    spread = Editor(load(str(tiny_ip2p)), devices=jax.devices())
    images = [photo("astronaut").rotate(90 * i) for i in range(n)]
    options = dict(steps=4, sampler="ddim", seed=list(range(n)))
    one, many = (x(images, ["make it red"] * n, **options) for x in (editor, spread))
    for x, y in zip(one, many, strict=True):
        assert np.abs(np.asarray(x).astype(int) - np.asarray(y).astype(int)).max() <= 1
    text = list(spread.program("ddim").compiled.values())[-1].as_text()
    height, width = (x // spread.model.config.vae.factor for x in images[0].size[::-1])
    features = spread.model.config.unet.channels[0]
    assert f"f32[1,{height},{width},{features}]" in text
    for whole in (3 * n, 8):  # all branches, and those that fill the devices up
        assert f"f32[{whole},{height},{width},{features}]" not in text


def test_one_program_per_shape_steps_and_sampler(editor):
    """Other pictures, texts, seeds and scales do not compile again."""
    image = photo("astronaut")
    editor(image, "one", steps=4, sampler="ddim")
    program = editor.program("ddim")
    before = len(program.compiled)
    editor(photo("rocket").resize(image.size), "two", steps=4, sampler="ddim", seed=9)
    editor(image, "three", steps=4, sampler="ddim", text_guidance=-1.0, image_guidance=0.0)
    assert len(program.compiled) == before
    editor(image, "one", steps=5, sampler="ddim")
    assert len(program.compiled) == before + 1


def test_after_warming_up_nothing_is_compiled(tiny_ip2p, monkeypatch, caplog):
    """For any number of pictures of that size, seeds and noise included. Controls: another number
    of steps is, and what is compiled can be seen."""
    warm = Editor(load(str(tiny_ip2p)), rows=3)
    warm.warm_up([(32, 16)], steps=2, sampler="ddim")
    program = warm.program("ddim")
    assert len(program.compiled) == 3  # of 1, 2 and 4 rows
    image = photo("coffee").resize((32, 16))
    monkeypatch.setattr(program, "make", None)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for n in (1, 2, 3, 5):
            assert len(warm([image] * n, INSTRUCTION, steps=2, sampler="ddim")) == n
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + n)(np.zeros(7))
        assert "Compiling" in caplog.text
    with pytest.raises(TypeError):
        warm(image, INSTRUCTION, steps=3, sampler="ddim")
    with pytest.raises(ValueError, match=r"sizes: \(30, 16\), expected multiples of 16 px"):
        warm.warm_up([(30, 16)])


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_guidance_of_any_size(editor, scale):
    """s_T and s_I of 0, 1 and below give finite pictures; with 1 and 1 the negative has no say."""
    image = photo("astronaut")
    options = dict(steps=4, sampler="ddim", text_guidance=scale, image_guidance=scale)
    [plain] = editor(image, "make it red", **options)
    [negative] = editor(image, "make it red", negative="something else entirely", **options)
    difference = np.abs(np.asarray(plain).astype(int) - np.asarray(negative).astype(int)).max()
    assert (difference <= 1) == (scale == 1.0)


def test_guidance_in_an_interval(editor):
    """Of all noise levels: as without one; of none: as with scales of 1; else neither."""
    image, options = photo("astronaut"), dict(steps=4, sampler="ddim")
    high = float(editor.model.grid("ddim", 4).sigmas[1])

    def edited(**more) -> np.ndarray:
        return np.asarray(editor(image, "make it red", **options, **more)[0]).astype(int)

    plain, unguided = edited(), edited(text_guidance=1.0, image_guidance=1.0)
    assert np.abs(edited(guidance_interval=(0.0, 1e9)) - plain).max() <= 1
    assert np.abs(edited(guidance_interval=(1e8, 1e9)) - unguided).max() <= 1
    partly = edited(guidance_interval=(0.0, high))
    assert min(np.abs(partly - x).max() for x in (plain, unguided)) > 1


def test_empty_instruction_returns_the_resized_input(editor):
    image = Image.fromarray(skimage.data.coffee())
    [same] = editor(image, "  ", resolution=64)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(photo("coffee")))


def test_own_size_is_rounded_down(editor):
    [edited] = editor(photo("astronaut").resize((71, 50)), "x", steps=STEPS, sampler="ddim")
    assert edited.size == (64, 48)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(sampler="plms"), "plms"),
        (dict(steps=-1), "-1"),
        (dict(steps=1001), "1001"),
        (dict(text_guidance=float("nan")), "text_guidance"),
        (dict(image_guidance=[1.0, 2.0]), "image_guidance: 2 values for 1 pictures"),
        (dict(seed=-1), "seed: -1"),
        (dict(negative=["a", "b"]), "negative: 2 values for 1 pictures"),
        (dict(latents=np.zeros((1, 3, 3, 4), np.float32)), "latents"),
        (dict(resolution=2), "4 x 2"),
    ],
)
def test_bad_arguments(editor, arguments, words):
    with pytest.raises(ValueError, match=words):
        editor(photo("astronaut"), "x", **{"steps": 1, "sampler": "ddim", **arguments})


def test_model_without_image_channels_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="conv_in.weight takes 4 channels"):
        Editor.from_pretrained(str(tiny_sd))


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parity
def test_full_size_edit_equals_diffusers(full_ip2p):
    """SD 1.5's shape, 256 px, ddim, 4 steps: final latents within 1e-3."""
    image = photo("astronaut", 256, 64)
    start = noise(image.size, factor=8)
    theirs = Theirs(StableDiffusionInstructPix2PixPipeline, full_ip2p)
    latents, picture = edited(theirs, image, start, steps=4)
    other, _ = edited(theirs, image, start, steps=4, s_i=1.6)
    del theirs
    our_latents, our_picture = ours(Editor.from_pretrained(str(full_ip2p)), image, start, steps=4)
    assert relative(our_latents, latents) < 1e-3
    assert psnr(our_picture, picture) > PSNR
    assert relative(our_latents, other) > 1e-3
