# SPDX-License-Identifier: Apache-2.0
"""Claims: a run of text-to-image is a model that generates as diffusers does with its export, and
that an editor starts from; a run of CLIP is one that scores as transformers does with its export;
data without captions, and what such runs cannot have, are one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from data_gen import pairs
from data_gen.pack import pack
from ip2p_jax import convert, generate
from ip2p_jax.evaluation.clip_scores import Clip
from ip2p_jax.generator import Generator
from ip2p_jax.weights.clip import load_clip
from ip2p_jax.weights.load import load
from tests.data.released import write_released
from tests.oracles import small_tokenizer
from tests.pipelines import LATENTS, Theirs, noise, relative
from tests.toy_runs import equal, lines, one_device_only, run, steps, toy_options

GENERATE = ("--config.objective.kind=generate", "--config.steps=2", "--config.optim.accumulate=1")


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with one_device_only():
        yield


@pytest.fixture(scope="module")
def options(packed, tmp_path_factory) -> list[str]:
    return [*toy_options(packed, tmp_path_factory.mktemp("sources")), *GENERATE]


@pytest.fixture(scope="module")
def generator_run(options, tmp_path_factory) -> Path:
    """Two steps from scratch, and a grid of what it makes."""
    workdir = tmp_path_factory.mktemp("run") / "sd"
    assert run(options, workdir, "--config.log.samples_every=2") == 0
    return workdir


@pytest.mark.slow
def test_a_run_generates(generator_run, tmp_path):
    """Its samples are beside the pictures they are to be like; the command makes pictures of it."""
    assert steps(generator_run) == [0, 2] and lines(generator_run)[-1]["loss"] > 0
    with Image.open(generator_run / "samples/00000002.png") as image:
        assert image.size == (2 * 16, 2 * 16)
    p = load(str(generator_run))
    assert p.config.unet.in_channels == 4 and p.params.keys() == {"unet", "vae", "text"}
    args = ["--model", generator_run, "--prompt", "scene 3", "--output", tmp_path / "a.png"]
    assert generate.main([*map(str, args), "--steps", "2"]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (16, 16)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_its_export_is_diffusers(generator_run, tmp_path):
    """The same final latents from the same noise; another text's are others."""
    folder = tmp_path / "exported"
    args = ["--from", str(generator_run), "--to", str(folder), "--format", "diffusers"]
    assert convert.main(args) == 0
    start = noise((16, 16), factor=2)
    pipeline = Theirs(StableDiffusionPipeline, folder)
    want, _ = pipeline(start, steps=4, prompt="scene 3", height=16, width=16, guidance_scale=7.5)
    generator = Generator.from_pretrained(str(generator_run))

    def latents(prompt: str) -> np.ndarray:
        options = dict(text_guidance=[7.5], seed=[0], negative=[""])
        batch = generator.batch(start, (16, 16), prompts=[prompt], **options)
        return generator.generate(batch, 4, "ddim").latents

    assert relative(latents("scene 3"), want) < LATENTS
    assert relative(latents("nothing of that kind"), want) > 10 * LATENTS


@pytest.mark.slow
def test_an_editor_starts_from_it(options, generator_run, tmp_path, capsys):
    """Widened; frozen is the VAE alone. Text-to-image from an editor is refused."""
    base = (f"--config.model.base={generator_run}", "--config.model.vae=")
    editor = tmp_path / "edit"
    assert run(options, editor, *base, "--config.objective.kind=edit", "--config.steps=1") == 0
    p, start = load(str(editor)), load(str(generator_run))
    assert p.config == start.config.widened() and equal(p.params["vae"], start.params["vae"])
    kernel, old = (x.params["unet"]["conv_in"]["kernel"] for x in (p, start))
    assert np.abs(kernel[:, :, :4] - old).max() < 1e-2
    capsys.readouterr()
    assert run(options, tmp_path / "sd", f"--config.model.base={editor}") == 2
    assert "config.model.base: the UNet's conv_in.weight takes 8" in capsys.readouterr().err


CLIP_CONFIG = """
from configs.shapes import clip
from ip2p_jax.models.presets import CLIPConfig, TextConfig, VisionConfig

def get_config():
    cfg = clip.get_config()
    small = dict(width=32, layers=1, heads=2, mlp_width=64)
    cfg.model.clip = CLIPConfig(
        TextConfig(vocab_size=1024, positions=24, **small),
        VisionConfig(image_size=16, patch_size=8, projection_dim=24, **small),
    )
    cfg.data.resolution, cfg.data.batch_size, cfg.optim.warmup = 16, 8, 0
    cfg.log.every, cfg.log.samples, cfg.log.samples_every, cfg.steps = 1, 4, 2, 2
    return cfg
"""


@pytest.fixture(scope="module")
def clip_options(packed, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "clip.py").write_text(CLIP_CONFIG)
    small_tokenizer().save_pretrained(folder / "tokenizer")
    return [
        f"--config={folder / 'clip.py'}",
        f"--config.data.path={packed}",
        f"--config.model.tokenizer={folder / 'tokenizer'}",
    ]


@pytest.fixture(scope="module")
def clip_run(clip_options, tmp_path_factory) -> Path:
    """Two steps from scratch."""
    workdir = tmp_path_factory.mktemp("run") / "clip"
    assert run(clip_options, workdir) == 0
    return workdir


@pytest.mark.parity
def test_a_run_is_a_clip(clip_run, tmp_path):
    """It opens as it is, and its export in transformers: the same scores, which are not those of
    other texts."""
    assert {"accuracy", "scale"} <= lines(clip_run)[-1].keys()
    with Image.open(clip_run / "samples/00000002.png") as image:
        assert image.size == (2 * 16, 4 * 16)
    folder = tmp_path / "exported"
    args = ["--from", str(clip_run), "--to", str(folder), "--format", "clip"]
    assert convert.main(args) == 0
    ours, exported = load_clip(str(clip_run)), load_clip(str(folder))
    assert ours.config == exported.config and equal(ours.params, exported.params)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    texts = ["a red circle", "two stars", "night", "a blue square on the left"]
    module, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    prepared = processor(
        text=texts,
        images=[Image.fromarray(x) for x in pictures],
        return_tensors="pt",
        padding="max_length",
    )
    with torch.no_grad():
        made = module(**prepared)
    want = made.logits_per_image.diagonal().numpy()
    scale = np.exp(ours.params["logit_scale"])
    got = Clip(ours).scores(pictures, pictures, texts, texts[::-1])
    np.testing.assert_allclose(got.sim_0 * scale, want, atol=1e-4 * scale)
    assert np.abs(got.sim_1 * scale - want).max() > 1e-2 * scale


@pytest.mark.slow
def test_what_is_no_clip(generator_run):
    with pytest.raises(ValueError, match="not a run that trained a CLIP, but"):
        load_clip(str(generator_run))


def test_it_goes_on(clip_options, clip_run, tmp_path):
    workdir = Path(shutil.copytree(clip_run, tmp_path / "clip"))
    assert run(clip_options, workdir, "--config.steps=3") == 0
    assert steps(workdir)[-1] == 3


@pytest.fixture(scope="module")
def without_captions(tmp_path_factory) -> Path:
    """Packed pairs of which one lacks the caption of its output."""
    folder = tmp_path_factory.mktemp("bare")
    released = write_released(folder / "released", 4)
    for prompt in released.glob("*/prompt.json"):
        if prompt.parent.name == "0000001":
            prompt.write_text(json.dumps(json.loads(prompt.read_text()) | {"output": ""}))
    pack([released], folder / "packed")
    return folder / "packed"


def test_what_cannot_be_trained(options, clip_options, without_captions, tmp_path, capsys):
    mistakes = [
        (options, f"data.path={without_captions}", "0000001"),
        (clip_options, f"data.path={without_captions}", "its output_caption is empty"),
        (clip_options, "model.tokenizer=", "config.model.tokenizer is empty"),
        (clip_options, "optim.accumulate=2", "config.optim.accumulate is 2, expected 1"),
        (clip_options, "model.base=photos", "config.model.base is 'photos', expected ''"),
        (options, "objective.kind=clop", "config.objective.kind is 'clop', expected one of"),
    ]
    for of_kind, option, line in mistakes:
        assert run(of_kind, tmp_path / "run", f"--config.{option}") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err, err


@pytest.mark.slow
def test_pairs_from_these_runs(generator_run, clip_run, tmp_path):
    """The chain: pictures of the text-to-image run, filtered by the run of CLIP."""
    triplets = tmp_path / "triplets.jsonl"
    line = {"input": "scene 1", "edit": "change it", "output": "scene 2"}
    triplets.write_text(json.dumps(line) + "\n")
    args = ["--triplets", triplets, "--output", tmp_path / "pairs"]
    args += ["--model", generator_run, "--clip", clip_run, "--resolution", "16", "--steps", "2"]
    assert pairs.main([*map(str, args), "--candidates", "2"]) == 0
