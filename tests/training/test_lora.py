# SPDX-License-Identifier: Apache-2.0
"""Claims: what is trained here, as a LoRA or whole, opens in diffusers and gives the same edit; a
LoRA has few numbers and leaves the rest of the model alone; a model that has 8 channels keeps them.
"""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline
from diffusers import UNet2DConditionModel
from einops import rearrange
from peft import LoraConfig

from ip2p_jax import config, convert, edit, jobs, train
from ip2p_jax.editor import Editor
from ip2p_jax.training import lora, mesh
from ip2p_jax.training.tasks.task import Task, given
from ip2p_jax.types import Params
from ip2p_jax.weights import lora as files
from ip2p_jax.weights.load import load, load_adapter
from ip2p_jax.weights.port import leaves
from tests.edits import ONE, PICTURE
from tests.oracles import tiny_folder
from tests.pipelines import LATENTS, Theirs, noise, relative
from tests.training.tiny import grid

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.py")
IMAGE = PICTURE.resize((32, 32))
INSTRUCTION = "make it red"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Trains on one device; the handler of SIGTERM is restored."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda cfg: grid(1, 1))
        yield
    signal.signal(signal.SIGTERM, before)


def base_folder(path: Path, channels: int) -> Path:
    """A model of two levels, random weights."""
    levels = dict(block_out_channels=(16, 32), norm_num_groups=8)
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    unet = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return tiny_folder(path, channels, unet=unet | levels, vae=vae | levels)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An editor: its UNet has 8 input channels."""
    return base_folder(tmp_path_factory.mktemp("base") / "editor", 8)


def run(base: Path, packed: Path, workdir: Path, *more: str) -> int:
    """Trains from `base`, large steps, the EMA as the parameters are."""
    options = {
        "model.base": base,
        "model.vae": "",
        "model.tokenizer": "",
        "model.train_text": False,
        "data.path": packed,
        "optim.lr": 0.02,
        "optim.warmup": 0,
        "optim.accumulate": 1,
        "optim.ema_decay": 0,
    }
    given = [f"--config.{key}={value}" for key, value in options.items()]
    return train.main([f"--config={CONFIG}", f"--workdir={workdir}", *given, *more])


LORA = ("--config.lora.rank=4", "--config.lora.alpha=8", "--config.lora.targets=attn+ff")


@pytest.fixture(scope="module")
def trained(base, packed, tmp_path_factory) -> Path:
    """A LoRA, in two goes."""
    workdir = tmp_path_factory.mktemp("run") / "lora"
    assert run(base, packed, workdir, *LORA, "--config.steps=1") == 0
    assert run(base, packed, workdir, *LORA, "--config.steps=3") == 0
    return workdir


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("exported") / files.FILE
    args = ["--from", str(trained), "--to", str(file), "--format", "lora"]
    assert convert.main(args) == 0
    return file


def equal(a: Params, b: Params) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))


def first_loss(workdir: Path) -> float:
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def ours(model: Path, **options) -> np.ndarray:
    """The final latents of an edit."""
    editor = Editor(load(str(model), **options))
    batch = editor.batch(
        [IMAGE],
        noise(IMAGE.size, factor=2),
        instructions=[INSTRUCTION],
        text_guidance=[7.5],
        image_guidance=[1.5],
        seed=[0],
        negative=[""],
    )
    return np.asarray(editor.edit(batch, 5, "ddim").latents)


def theirs(pipeline: Theirs) -> np.ndarray:
    scales = dict(guidance_scale=7.5, image_guidance_scale=1.5)
    start = noise(IMAGE.size, factor=2)
    return pipeline(start, "ddim", 5, prompt=INSTRUCTION, image=IMAGE, **scales)[0]


@pytest.mark.slow
@pytest.mark.parity
def test_a_lora_trained_here_edits_alike_in_diffusers(trained, exported):
    """The run's base and the exported file, opened by diffusers; without the file it is another
    edit."""
    pipeline = Theirs(Pipeline, trained / "base")
    before = theirs(pipeline)
    pipeline.pipe.load_lora_weights(exported)
    latents = ours(trained)
    assert relative(latents, theirs(pipeline)) < LATENTS
    assert relative(latents, before) > 100 * LATENTS
    pipeline.pipe.set_adapters("default_0", 0.5)
    half = ours(trained / "base", lora=[f"{exported}:0.5"])
    assert relative(half, theirs(pipeline)) < LATENTS


@pytest.mark.slow
@pytest.mark.parity
def test_a_model_trained_whole_edits_alike_in_diffusers(base, packed, trained, tmp_path):
    """From 8 channels, which are neither widened nor set to zero."""
    workdir, folder = tmp_path / "run", tmp_path / "exported"
    assert run(base, packed, workdir, "--config.steps=1") == 0
    assert first_loss(workdir) == pytest.approx(first_loss(trained), rel=1e-6)  # B begins as zero
    p, source = load(str(workdir)), load(str(base))
    assert p.config == source.config and p.config.unet.in_channels == 8
    kernels = [x.params["unet"]["conv_in"]["kernel"] for x in (p, source)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.03  # one step of Adam
    args = ["--from", str(workdir), "--to", str(folder), "--format", "diffusers"]
    assert convert.main(args) == 0
    latents = ours(workdir)
    assert relative(latents, theirs(Theirs(Pipeline, folder))) < LATENTS
    assert relative(latents, theirs(Theirs(Pipeline, base))) > 100 * LATENTS


@pytest.mark.slow
def test_only_pairs_are_trained(trained, base):
    """Checkpoints hold A and B; the rest of the model is as it was."""
    with ocp.CheckpointManager(trained / "checkpoints", item_names=("train", "ema")) as manager:
        read = ocp.args.StandardRestore()
        saved = manager.restore(3, args=ocp.args.Composite(train=read, ema=read))
    assert saved["ema"].keys() == saved["train"]["params"].keys() == {"lora"}
    p, source = load(str(trained)), load(str(base))
    of = files.matrices(source.params["unet"])
    adapted = set(lora.chosen(source.params["unet"], "attn+ff"))
    for path, x in leaves(p.params):
        name = ".".join(map(str, path[1:-1]))
        changed = path[0] == "unet" and path[-1] in ("weight", "kernel") and name in adapted
        y = source.params
        for key in path:
            y = y[key]
        assert np.array_equal(x, y) != changed, path
    assert 0 < len(adapted) < len(of)
    assert equal(load(str(trained / "base")).params, source.params)


def test_loss_and_samples_are_those_of_the_merged_model(base):
    """Whatever the task; `frozen` goes through."""
    p = load(str(base))
    task = Task(p.config, given({}), p.params, lambda *x: x, lambda *x: x)  # pyright: ignore
    task = lora.low_rank(task, config.Lora(rank=2, alpha=4.0, targets="to_q"), jax.random.key(0))
    pairs = jax.tree.map(np.ones_like, task.start.shapes["lora"])
    for made in (
        task.loss({"lora": pairs}, p.params, 1, 2),
        task.sample({"lora": pairs}, p.params, 1),
    ):
        params, frozen, *rest = made
        assert frozen is p.params and rest in ([1, 2], [1])
        assert params.keys() == {"unet"}
        before = files.matrices(p.params["unet"])
        for layer, x in files.matrices(params["unet"]).items():
            added = 4.0 if layer.endswith("to_q") else 0.0  # alpha / rank times rank
            np.testing.assert_allclose(x, before[layer] + added, rtol=1e-6)


@pytest.mark.slow
def test_file_and_run_are_the_same_model(trained, exported, tmp_path):
    """To the last bit (alpha / rank is 2), merged at opening or by `convert`."""
    p = load(str(trained))
    assert equal(load(str(trained / "base"), lora=[str(exported)]).params, p.params)
    tensors = files.read(exported, p.params)["unet"]
    adapter = load_adapter(str(trained))
    assert (adapter.rank, adapter.alpha) == (4, 8.0)
    assert {".".join(map(str, path[:-1])) for path, _ in leaves(tensors)} == {
        name.removesuffix(".weight") for name in adapter.tensors
    }
    merged = tmp_path / "merged"
    args = ["--from", str(trained / "base"), "--to", str(merged), "--format", "diffusers"]
    assert convert.main([*args, "--lora", f"{exported}:0.5", "--lora", f"{exported}:0.5"]) == 0
    for (path, x), (_, y) in zip(leaves(load(str(merged)).params), leaves(p.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=str(path))


@pytest.mark.slow
def test_bad_exports(trained, base, exported, tmp_path, capsys):
    out = str(tmp_path / "a.safetensors")
    for more, line in (
        (["--from", str(base), "--to", out], "no checkpoint under"),
        (["--from", str(trained), "--to", str(tmp_path / "a")], "ends in .safetensors"),
        (["--from", str(trained), "--to", out, "--lora", str(exported)], "--lora: expected"),
    ):
        assert convert.main([*more, "--format", "lora"]) == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_4_channels_needs_conv_in(packed, tmp_path, capsys):
    """Its new channels are zero: a LoRA without conv_in could not learn them."""
    source, workdir = base_folder(tmp_path / "sd", 4), tmp_path / "run"
    capsys.readouterr()
    assert run(source, packed, workdir, *LORA) == 2
    err = capsys.readouterr().err
    assert "config.lora.targets: expected conv_in" in err and err.count("\n") == 1


@pytest.mark.slow
def test_from_a_model_of_4_channels(packed, tmp_path):
    """Widened once, in the run's base; the new channels are learnt."""
    source, workdir = base_folder(tmp_path / "sd", 4), tmp_path / "run"
    more = (*LORA[:2], "--config.lora.targets=conv_in", "--config.steps=1")
    assert run(source, packed, workdir, *more) == 0
    new = [load(str(x)).params["unet"]["conv_in"]["kernel"] for x in (workdir, workdir / "base")]
    assert np.abs(new[0][:, :, 4:]).max() > 1e-3 and not np.any(new[1][:, :, 4:])


@pytest.mark.slow
def test_text_to_image(packed, tmp_path):
    """The same additions to a model of 4 channels that stays one."""
    source, workdir = base_folder(tmp_path / "sd", 4), tmp_path / "run"
    more = (*LORA, "--config.objective.kind=generate", "--config.steps=1")
    assert run(source, packed, workdir, *more) == 0
    p = load(str(workdir))
    assert p.config.unet.in_channels == 4
    assert not equal(p.params["unet"], load(str(source)).params["unet"])


@pytest.mark.parity
def test_layers_and_first_numbers_are_those_of_peft(base):
    """`targets` chooses the layers that PEFT's target_modules choose; A is drawn alike."""
    unet = load(str(base)).params["unet"]
    for targets, names in (
        ("attn+ff", [*lora.GROUPS["attn"], *lora.GROUPS["ff"]]),
        ("to_q+conv_in+proj", ["to_q", "conv_in", "proj"]),
    ):
        model = UNet2DConditionModel.from_pretrained(base / "unet")
        model.add_adapter(LoraConfig(r=4, target_modules=names))
        drawn = {n: x for n, x in model.named_parameters() if ".lora_" in n}
        of = lora.chosen(unet, targets)
        assert set(of) == {name.partition(".lora_")[0] for name in drawn}
        first = lora.first_pairs(of, 4, jax.random.key(0))
        assert equal(files.merge(unet, first), unet)  # B is zero
        for path, x in leaves(first):
            name = ".".join(map(str, path[:-1]))
            peft = drawn[f"{name}.default.weight"].detach().numpy()
            x = x if x.ndim == 2 else rearrange(x, "h w i o -> o i h w")
            assert x.shape == peft.shape
            assert np.abs(x).max() <= (bound := float(np.prod(x.shape[1:])) ** -0.5)
            assert np.abs(peft).max() <= bound * (1 + 1e-6)
            if path[-2] == "lora_A":
                np.testing.assert_allclose(np.std(x), bound / 3**0.5, rtol=0.2)


@pytest.mark.parametrize("targets", ["", "attn+", "to_r", "q", "attn,ff"])
def test_targets_that_are_no_layers(base, targets):
    with pytest.raises(ValueError, match="config.lora.targets is"):
        lora.chosen(load(str(base)).params["unet"], targets)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            dict(objective=config.Objective(kind="vae"), model=config.Model(base="")),
            "needs config.objective.kind=edit",
        ),
        (dict(model=config.Model(base="")), "needs config.model.base"),
        (dict(model=config.Model(train_text=True)), "needs config.model.train_text=False"),
        (dict(lora=config.Lora(rank=-1)), "config.lora.rank is -1, expected 0 or more"),
        (dict(lora=config.Lora(rank=4, alpha=0.0)), "config.lora.alpha is 0.0, expected"),
    ],
)
def test_configurations_that_no_lora_can_have(change, line):
    with pytest.raises(ValueError, match=line):
        given = dict(lora=config.Lora(rank=4), data=config.Data(path="packed"))
        config.check(config.Config(**{**given, **change}))


@pytest.mark.slow
def test_use(base, exported, tmp_path, monkeypatch, capsys):
    """`--lora` of the commands that open a model; a picture's settings tell it."""
    args = ["--model", str(base), "--lora", str(exported), "--lora", f"{exported}:-1"]
    args = edit.parser().parse_args(args)
    with_none = load(str(base)).params
    for (path, x), (_, y) in zip(
        leaves(jobs.load_model(args).params), leaves(with_none), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=str(path))  # added, and taken away
    args.lora.pop()
    assert not equal(jobs.load_model(args).params, with_none)
    assert jobs.settings(args, edit.Request("in.png", "x", "out.png"))["lora"] == [str(exported)]

    monkeypatch.chdir(tmp_path)
    IMAGE.save("in.png")
    line = ["--model", str(base), *ONE, "--lora", "no.safetensors"]
    assert edit.main(line) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no.safetensors: no such file"
