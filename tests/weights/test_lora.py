# SPDX-License-Identifier: Apache-2.0
"""Claims: a LoRA that PEFT, diffusers or kohya's scripts wrote, merged here, gives the weights that
PEFT merges; what does not fit is one line that names the tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ip2p_jax.types import Params
from ip2p_jax.weights import lora
from ip2p_jax.weights.load import load
from ip2p_jax.weights.port import to_torch

TOLERANCE = 1e-5
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TARGETS = [*LINEAR, "proj_in", "conv_in", "conv1", "time_emb_proj"]
SETTINGS = LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=TARGETS,
    rank_pattern={"conv_in": 3},
    alpha_pattern={"to_q": 1},
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


@pytest.fixture(scope="module")
def params(tiny_ip2p) -> dict[str, Params]:
    return load(str(tiny_ip2p)).params


def open_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet")


def draw(unet: torch.nn.Module) -> None:
    """Gives A and B random numbers: PEFT begins with B = 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in unet.named_parameters():
            if ".lora_" in name:
                x.normal_(std=0.2, generator=generator)


@pytest.fixture(scope="module")
def adapted(tiny_ip2p) -> UNet2DConditionModel:
    """diffusers' UNet with an adapter of PEFT's on every kind of layer."""
    unet = open_unet(tiny_ip2p)
    unet.add_adapter(SETTINGS)
    draw(unet)
    return unet


def fused(unet: UNet2DConditionModel) -> dict[str, np.ndarray]:
    """The weights after PEFT has merged the adapter; the UNet is as before."""
    unet.fuse_lora()
    state = {name.replace(".base_layer", ""): x for name, x in unet.state_dict().items()}
    state = {name: x.clone().numpy() for name, x in state.items() if ".lora_" not in name}
    unet.unfuse_lora()
    return state


@pytest.fixture(scope="module")
def merged(adapted) -> dict[str, np.ndarray]:
    return fused(adapted)


def error(ours: Params, theirs: dict[str, np.ndarray]) -> float:
    """The largest difference relative to the largest value, of any tensor."""
    got = to_torch(ours)
    assert got.keys() == theirs.keys()
    return max(np.abs(got[k] - x).max() / np.abs(x).max() for k, x in theirs.items())


def as_diffusers(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As `unet.save_lora_adapter` writes it: the layers' own names, PEFT's settings inside."""
    unet.save_lora_adapter(folder, adapter_name="default")
    return folder


def as_pipeline(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As `Pipeline.save_lora_weights` writes it: `unet.` before names and settings."""
    state = get_peft_model_state_dict(unet)
    settings = unet.peft_config["default"].to_dict()
    Pipeline.save_lora_weights(folder, state, unet_lora_adapter_metadata=settings)
    return folder / lora.FILE


def alpha_of(layer: str) -> float:
    return 1.0 if layer.endswith("to_q") else 6.0


def as_kohya(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As kohya's scripts write it: an alpha beside each pair."""
    state = {}
    for name, x in get_peft_model_state_dict(unet).items():
        layer, leaf = name.split(".lora_")
        stem = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{stem}.lora_{'down' if leaf == 'A.weight' else 'up'}.weight"] = x.contiguous()
        state[f"{stem}.alpha"] = torch.tensor(alpha_of(layer))
    save_file(state, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


@pytest.mark.parity
@pytest.mark.parametrize("save", [as_diffusers, as_pipeline, as_kohya])
def test_merged_as_peft_merges(params, adapted, merged, tmp_path, save):
    """Linear maps, convolutions of both sizes, ranks and alphas of their own."""
    got = lora.add(params, str(save(adapted, tmp_path)))
    assert error(got["unet"], merged) < TOLERANCE
    assert error(params["unet"], merged) > 0.1  # control: not merged
    assert got["text"] is params["text"] and got["vae"] is params["vae"]


@pytest.mark.parity
def test_scale(params, adapted, merged, tmp_path):
    """FILE:SCALE moves so much of the way."""
    file = as_pipeline(adapted, tmp_path)
    base = to_torch(params["unet"])
    half = {name: (x + base[name]) / 2 for name, x in merged.items()}
    assert error(lora.add(params, f"{file}:0.5")["unet"], half) < TOLERANCE
    back = lora.add(lora.add(params, str(file)), f"{file}:-1")
    assert error(back["unet"], base) < TOLERANCE


@pytest.mark.parity
def test_without_alpha(params, tiny_ip2p, tmp_path):
    """Training scripts of diffusers write `lora.down`, and no alpha: it is the rank."""
    unet = open_unet(tiny_ip2p)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR[:4]))
    draw(unet)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    Pipeline.save_lora_weights(tmp_path, state)
    assert any(name.endswith(".lora.down.weight") for name in load_file(tmp_path / lora.FILE))
    got = lora.add(params, str(tmp_path))["unet"]
    assert error(got, fused(unet)) < TOLERANCE


@pytest.mark.parity
def test_models_of_peft(params, tiny_ip2p, tmp_path):
    """`PeftModel.save_pretrained`: another prefix, and the settings in a file beside it."""
    model = get_peft_model(
        open_unet(tiny_ip2p), LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"])
    )
    draw(model)
    model.save_pretrained(tmp_path)
    want = {n: x.numpy() for n, x in model.merge_and_unload().state_dict().items()}
    got = lora.add(params, str(tmp_path / "adapter_model.safetensors"))["unet"]
    assert error(got, want) < TOLERANCE
    (tmp_path / "adapter_config.json").unlink()  # control: alpha is not known
    got = lora.add(params, str(tmp_path / "adapter_model.safetensors"))["unet"]
    assert error(got, want) > 1e-2


def small(params: dict[str, Params]) -> lora.Adapter:
    """Pairs of two layers, all ones."""
    of = lora.matrices(params["unet"])
    of = {layer: of[layer] for layer in ("conv_in", "mid_block.attentions.0.proj_in")}
    tree = lora.shapes(of, dict.fromkeys(of, 4))

    def ones(node: Params) -> Params:
        return {
            k: ones(x) if isinstance(x, dict) else np.ones(x.shape, "f4") for k, x in node.items()
        }

    return lora.Adapter(to_torch(ones(tree)), 8.0)


def test_written_and_read(params, tmp_path):
    """Exactly; alpha / rank, a power of two, is then in B."""
    adapter = small(params)
    lora.write(adapter, tmp_path / "new" / "a.safetensors")
    (read_in,) = lora.read(tmp_path / "new" / "a.safetensors", params).values()
    got, want = to_torch(read_in), adapter.tensors
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], 2 * x if "lora_B" in name else x)
    with pytest.raises(ValueError, match="already there"):
        lora.write(adapter, tmp_path / "new" / "a.safetensors")


CONV_IN = "unet.conv_in.lora_"
BAD = [
    (
        {f"{CONV_IN}A.weight": (4, 4, 3, 3)},
        r"conv_in.lora_A.weight \(4, 4, 3, 3\), expected \(4, 8",
    ),
    ({f"{CONV_IN}B.weight": (32, 5, 1, 1)}, r"conv_in.lora_B.weight \(32, 5, 1, 1\), expected"),
    ({f"{CONV_IN}B.weight": None}, r"1 tensor missing: conv_in.lora_B.weight \(32, 4, 1, 1\)"),
    ({f"{CONV_IN}A.weight": None}, "1 tensor missing: conv_in.lora_A.weight"),
    ({"unet.conv_9.lora_A.weight": (4, 8)}, "no layer of the model has: unet.conv_9.lora_A.weight"),
    ({"unet.conv_in.lora_magnitude_vector": (32,)}, "unet.conv_in.lora_magnitude_vector"),
    ({f"{CONV_IN}A.weight": ()}, r"conv_in.lora_A.weight \(\), expected"),
    ({"unet.conv_in.alpha": (2,)}, r"alpha of conv_in is \[1. 1.\], expected one finite number"),
]


@pytest.mark.parametrize(("change", "line"), BAD)
def test_what_does_not_fit_is_named(params, tmp_path, change, line):
    file = tmp_path / "a.safetensors"
    lora.write(small(params), file)
    state = load_file(file)
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.ones(shape)
    save_file(state, file)
    with pytest.raises(ValueError, match=line) as caught:
        lora.add(params, str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({"unet.use_dora": True}), "use_dora is set"),
        (json.dumps({"unet.lora_alpha": "much"}), "alpha is not sound"),
        (json.dumps({"unet.alpha_pattern": {"(": 1}}), "alpha is not sound"),
        (json.dumps({"unet.lora_alpha": float("nan")}), "alpha of .* is nan, expected one finite"),
    ],
)
def test_settings_that_are_not_sound(params, tmp_path, settings, line):
    file = tmp_path / "a.safetensors"
    lora.write(small(params), file)
    save_file(load_file(file), file, {lora.METADATA: settings})
    with pytest.raises(ValueError, match=line):
        lora.add(params, str(file))


def test_options(params, tmp_path):
    for option, kind, line in (
        ("nowhere.safetensors", FileNotFoundError, "nowhere.safetensors: no such file"),
        (f"{tmp_path}:0.5", FileNotFoundError, lora.FILE),
        (f"{tmp_path}:nan", ValueError, "SCALE a finite number"),
        (__file__, ValueError, "expected a LoRA as .safetensors"),
    ):
        with pytest.raises(kind, match=line):
            lora.add(params, option)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="no tensors"):
        lora.add(params, str(tmp_path / "empty.safetensors"))
