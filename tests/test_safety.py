# SPDX-License-Identifier: Apache-2.0
"""`--safety` flags the pictures that diffusers' safety checker flags, by the same scores.

The checker here is tiny, its weights are random, its thresholds lie among the similarities of real
photographs; diffusers writes it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from diffusers.pipelines.stable_diffusion import safety_checker as oracle
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ip2p_jax import edit, safety
from ip2p_jax.models.presets import TINY
from ip2p_jax.safety import SafetyChecker, read_preprocessing
from ip2p_jax.weights.load import Pretrained
from ip2p_jax.weights.names import Names
from tests.models.test_clip_vision import TINY as TINY_VISION
from tests.oracles import randomize, small_tokenizer

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
SIZE = TINY_VISION["image_size"]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Square, wide, grey, upright, and smaller than CLIP's input."""
    names = ("astronaut", "coffee", "chelsea", "rocket", "camera")
    images = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    return [*images, images[0].crop((150, 0, 251, 300)), images[1].resize((30, 20))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos) -> Path:
    """A `safety_checker` folder written by diffusers, its preprocessor beside it."""
    path = tmp_path_factory.mktemp("model")
    config = CLIPConfig(vision_config=TINY_VISION, projection_dim=TINY_VISION["projection_dim"])
    module: Any = randomize(oracle.StableDiffusionSafetyChecker(config), 2)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    pixels = processor(photos, return_tensors="pt").pixel_values
    with torch.no_grad():
        x = module.visual_projection(module.vision_model(pixels)[1])
        special = oracle.cosine_distance(x, module.special_care_embeds)
        concept = oracle.cosine_distance(x, module.concept_embeds)
        # each special concept is met by one picture, the first concept by another; the nearest
        # pictures of the other concepts are flagged only if their thresholds were lowered
        module.special_care_embeds_weights.copy_(special.max(dim=0).values - 0.005)
        module.concept_embeds_weights.copy_(concept.max(dim=0).values + 0.005)
        module.concept_embeds_weights[0] -= 0.01
    module.save_pretrained(path / "safety_checker")
    processor.save_pretrained(path / "feature_extractor")
    return path / "safety_checker"


@pytest.fixture(scope="module")
def expected(folder, photos) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """diffusers' scores, (n, 3) and (n, 17), and its flags; checked to be worth comparing with."""
    module = oracle.StableDiffusionSafetyChecker.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder.parent / "feature_extractor")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        record = lambda x, digits: (seen.append(x), round(x, digits))[1]  # noqa: E731
        patch.setattr(oracle, "round", record, raising=False)
        pixels = processor(photos, return_tensors="pt").pixel_values
        _, flags = module(pixels, [np.asarray(photo) for photo in photos])
    exact = np.reshape(seen, (len(photos), 20))
    assert 0 < sum(flags) < len(flags)
    assert (
        np.abs(exact.astype(float) * 1000 % 1 - 0.5).min() > 0.002
    )  # no score on the edge of rounding
    scores = exact.round(3)
    return scores[:, :3], scores[:, 3:], flags


def pretrained(folder: Path | None) -> Pretrained:
    """A model of which only the safety checker matters."""
    return Pretrained(TINY, {}, small_tokenizer(), None, Names(), folder)


def errors(checker: SafetyChecker, photos, expected) -> list[float]:
    ours = [checker.scores(photo) for photo in photos]
    return [
        float(np.abs(np.concatenate(group) - theirs).max())
        for group, theirs in zip(zip(*ours, strict=True), expected[:2], strict=True)
    ]


def today(folder: Path) -> None:
    """As diffusers writes it."""


def released(folder: Path) -> dict[str, np.ndarray]:
    """As in 2022: longer names, an integer buffer, sizes as numbers, a second configuration."""
    file = folder / "model.safetensors"
    tensors = {
        "vision_model." + name if name.startswith("vision_model.") else name: x
        for name, x in load_file(file).items()
    }
    positions = np.arange((SIZE // TINY_VISION["patch_size"]) ** 2 + 1)[None]
    tensors["vision_model.vision_model.embeddings.position_ids"] = positions
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_config_dict": config["vision_config"], "vision_config": {"hidden_size": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = safety.extractor(folder)
    settings = json.loads(preprocessor.read_text()) | {"size": SIZE, "crop_size": SIZE}
    old = {key: x for key, x in settings.items() if "rescale" not in key}
    preprocessor.write_text(json.dumps(old))
    return tensors


def pickled(folder: Path) -> None:
    """As released, by torch.save."""
    tensors = {name: torch.from_numpy(x) for name, x in released(folder).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def variant(folder: Path) -> None:
    """Only the file of a variant."""
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


@pytest.mark.parametrize("written", [today, released, pickled, variant])
def test_scores_and_flags(written, folder, photos, expected, tmp_path):
    """Whoever wrote the folder, scores and flags are diffusers'."""
    shutil.copytree(folder.parent, tmp_path, dirs_exist_ok=True)
    written(tmp_path / folder.name)
    checker = SafetyChecker.from_pretrained(pretrained(tmp_path / folder.name))
    assert max(errors(checker, photos, expected)) < TOLERANCE
    assert checker.flagged(photos) == expected[2]


def test_control_adjustment(folder, photos, expected, monkeypatch):
    """Without the adjustment by special concepts, scores of both kinds and flags differ."""
    monkeypatch.setattr(safety, "ADJUSTMENT", 0.0)
    checker = SafetyChecker.from_pretrained(pretrained(folder))
    assert min(errors(checker, photos, expected)) > 50 * TOLERANCE
    assert checker.flagged(photos) != expected[2]


def test_control_picture(folder, photos, expected):
    """Pictures upside down have other scores."""
    checker = SafetyChecker.from_pretrained(pretrained(folder))
    turned = [photo.transpose(Image.Transpose.ROTATE_180) for photo in photos]
    assert min(errors(checker, turned, expected)) > 10 * TOLERANCE


@pytest.mark.parametrize("edge, crop", [(224, 224), (40, 32)])
def test_preprocessing(edge, crop, photos, tmp_path):
    """Pixels are those of transformers' processor; nearest instead of bicubic is seen."""
    theirs = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop)
    theirs.save_pretrained(tmp_path)
    ours = read_preprocessing(tmp_path / "preprocessor_config.json", crop)
    wrong = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop, resample=0)
    for photo in photos:
        pixels = np.moveaxis(ours(photo), -1, 0)
        assert np.abs(pixels - theirs(photo).pixel_values[0]).max() < 1e-5
        assert np.abs(pixels - wrong(photo).pixel_values[0]).max() > 0.1


def test_black_out(folder, photos, expected):
    """Flagged pictures come back black in their own size, the others as they were."""
    results = SafetyChecker.from_pretrained(pretrained(folder)).black_out(photos)
    for photo, result, flagged in zip(photos, results, expected[2], strict=True):
        assert result.size == photo.size
        assert (result.getextrema() == ((0, 0),) * 3) if flagged else result is photo


def test_edit_with_safety(folder, tiny_ip2p, tmp_path, capsys):
    """`edit --safety` blacks out what the model's own checker flags; without one it is an error.

    The instruction is empty, which leaves the picture as it is and the networks out of the test.
    """
    model = shutil.copytree(tiny_ip2p, tmp_path / "model")
    Image.fromarray(skimage.data.astronaut()).resize((64, 64)).save(tmp_path / "in.png")
    arguments = ["--model", str(model), "--input", str(tmp_path / "in.png")]
    arguments += ["--instruction", "", "--output", str(tmp_path / "out.png")]
    assert edit.main([*arguments, "--safety"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --safety: ") and "safety_checker" in error
    shutil.copytree(folder.parent, model, dirs_exist_ok=True)
    file = model / folder.name / "model.safetensors"
    save_file(load_file(file) | {"concept_embeds_weights": np.full(17, -1, np.float32)}, file)
    for options, black in (([], False), (["--safety"], True)):
        assert edit.main([*arguments, *options]) == 0
        with Image.open(tmp_path / "out.png") as image:
            assert (image.getextrema() == ((0, 0),) * 3) == black


def no_preprocessor(folder: Path) -> Path:
    safety.extractor(folder).unlink()
    return safety.extractor(folder)


def no_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def missing_tensor(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if k != "concept_embeds"}, file)
    return file


def other_crop(folder: Path) -> Path:
    file = safety.extractor(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crop_size": SIZE // 2}))
    return file


def no_crop(folder: Path) -> Path:
    file = safety.extractor(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": False}))
    return file


@pytest.mark.parametrize(
    "spoil", [no_preprocessor, no_weights, missing_tensor, other_crop, no_crop]
)
def test_spoiled_folder(spoil, folder, tmp_path):
    """What is missing or not supported is said in one line that names the file."""
    shutil.copytree(folder.parent, tmp_path, dirs_exist_ok=True)
    named = spoil(tmp_path / folder.name)
    with pytest.raises(ValueError) as error:
        SafetyChecker.from_pretrained(pretrained(tmp_path / folder.name))
    assert str(named) in str(error.value) and "\n" not in str(error.value)


def test_no_folder():
    """A model without a checker is refused, naming the option and the folder that it lacks."""
    with pytest.raises(ValueError, match="--safety: .* safety_checker"):
        SafetyChecker.from_pretrained(pretrained(None))
