# SPDX-License-Identifier: Apache-2.0
"""Claims: the defaults are the paper's; wrong options are one line; --help shows the whole tree."""

import dataclasses
from pathlib import Path

import pytest

from ip2p_jax import config, train
from ip2p_jax.config import Config

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = CONFIGS / "tiny_cpu.py"


def parse(*more: str, file: Path = TINY) -> Config:
    command = config.parse([f"--config={file}", "--workdir=w", *more])
    assert command is not None
    return command.config


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("[a-z]*.py")), ids=lambda x: x.stem)
def test_every_file_is_a_config(file):
    assert isinstance(parse(file=file), Config)


def test_the_papers_recipe():
    cfg = parse(file=CONFIGS / "tpu_v4.py")
    assert (cfg.data.batch_size, cfg.optim.accumulate, cfg.steps) == (1024, 4, 10_000)
    assert (cfg.optim.name, cfg.optim.clip, cfg.optim.cosine_steps) == ("adamw", 0, 0)
    assert (cfg.optim.b1, cfg.optim.b2, cfg.optim.eps) == (0.9, 0.999, 1e-8)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.warmup) == (1e-4, 0.01, 0)
    assert (cfg.optim.ema_decay, cfg.objective.drop_rate) == (0.9999, 0.05)
    assert (cfg.data.resolution, cfg.data.flip, cfg.dtype) == (256, 0.5, "auto")
    assert (cfg.optim, cfg.objective, cfg.steps) == (Config().optim, Config().objective, 10_000)


def test_command_line():
    more = ["--config.optim.lr=3e-5", "--override=optim.lr", "--override=seed", "--distributed"]
    command = config.parse([f"--config={TINY}", "--workdir=w", *more])
    assert command is not None
    assert command[1:4] == ("w", ["optim.lr", "seed"], config.Hosts(distributed=True))
    assert command.config.optim.lr == 3e-5 and parse().optim.lr == 1e-3
    assert parse("--config.model.train_text=False").model.train_text is False


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--config.optim.speed=1"], "speed"),
        (["--config.optim=1"], "optim"),
        (["--config.steps=many"], "many"),
        (["--config.optim.lr=fast"], "fast"),
        (["--config.steps=0"], "config.steps is 0, expected 1 or more"),
        (["--config.optim.accumulate=0"], "config.optim.accumulate is 0"),
        (["--config.optim.cosine_steps=2"], "cosine_steps is 2, expected 0 or more than config"),
        (["--config.remat=all"], "config.remat is 'all', expected one of none, blocks, full"),
        (["--config.objective.min_snr_gamma=-1"], "min_snr_gamma is -1.0, expected 0 or more"),
        (["--config.model.zero_terminal_snr=True"], "needs config.model.prediction=v_prediction"),
        (["--config.optim.name=lion"], "optim.name is 'lion', expected one of adamw, adafactor"),
        (["--config.data.batch_size=0"], "config.data.batch_size is 0, expected 1 or more"),
        (["--config.data.resolution=0"], "config.data.resolution is 0, expected 1 or more"),
        (["--config.data.path="], "config.data.path is '', expected a folder of data_gen.pack"),
        (["--config.data.resize_max=9"], "resize_max 9: expected at least config.data.res"),
        (["--config.data.resize_min=9"], "config.data.resize_min is 9, config.data.resize_max 16"),
        (["--config.data.resize_min=20", "--config.data.resize_max=18"], "not above the other"),
        (["--config.data.flip=1.5"], "config.data.flip is 1.5, expected 0 to 1"),
        (["--config.checkpoint.every=0"], "config.checkpoint.every is 0, expected 1 or more"),
        (["--config.log.samples_every=-1"], "config.log.samples_every is -1, expected 0 or more"),
        (["--config.optim.warmup=-1"], "config.optim.warmup is -1, expected 0 or more"),
        (["--config.optim.lr=0"], "config.optim.lr is 0.0, expected a number above 0"),
        (["--config.optim.lr=nan"], "config.optim.lr is nan, expected a number above 0"),
        (["--config.optim.ema_decay=1"], "optim.ema_decay is 1.0, expected 0 or more, below 1"),
        (["--config.objective.drop_rate=0.4"], "objective.drop_rate is 0.4, expected 0 to 1/3"),
        (["--config.objective.kind=gan"], "'gan', expected one of edit, generate, vae, clip"),
        (["--config.dtype=float16"], "expected one of auto, float32, bfloat16"),
        (["--speed=1"], "speed"),
        (["again"], "again: expected options only"),
    ],
)
def test_wrong_options(more, line, capsys, tmp_path):
    assert train.main([f"--config={TINY}", f"--workdir={tmp_path / 'w'}", *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert not (tmp_path / "w").exists()


USELESS = [
    ("shapes/vae", "remat=full", "'full', without effect with config.objective.kind=vae"),
    ("shapes/vae", "objective.drop_rate=0.1", "0.1, without effect with config.objective"),
    ("shapes/vae", "model.tokenizer=x", "'x', without effect with config.objective.kind=vae"),
    ("shapes/clip", "model.train_text=True", "True, without effect with config.objective"),
    ("shapes/clip", "model.vae=x", "'x', without effect with config.objective.kind=clip"),
    ("shapes/sd", "objective.kl_weight=1.0", "1.0, without effect with config.objective.kind=gen"),
    ("shapes/edit", "model.prediction=v_prediction", "'v_prediction', without effect with a c"),
    ("shapes/edit", "lora.alpha=8.0", "8.0, without effect without config.lora.rank"),
]


@pytest.mark.parametrize(("file", "option", "line"), USELESS)
def test_no_setting_is_without_effect(file, option, line):
    name = option.partition("=")[0]
    with pytest.raises(ValueError, match=f"^config.{name} is {line}"):
        parse(f"--config.{option}", file=CONFIGS / f"{file}.py")


def test_a_decoder_has_no_use_for_the_weight_of_its_encoder():
    vae = dict(file=CONFIGS / "vae_cpu.py")
    parse("--config.model.vae=x", **vae)
    parse("--config.objective.kl_weight=2.0", **vae)
    with pytest.raises(
        ValueError, match="^config.objective.kl_weight is 2.0, without effect on th"
    ):
        parse("--config.model.vae=x", "--config.objective.kl_weight=2.0", **vae)


def test_adafactor_has_no_use_for_the_settings_of_adam():
    parse("--config.optim.name=adafactor")
    with pytest.raises(ValueError, match="^config.optim.b1 is 0.5, without effect with config.opt"):
        parse("--config.optim.name=adafactor", "--config.optim.b1=0.5")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "--config FILE and --workdir DIR are needed"),
        (["--config={config}"], "--config FILE and --workdir DIR are needed"),
        (["--workdir={tmp}"], "--config FILE and --workdir DIR are needed"),
        (["--config={tmp}/none.py", "--workdir={tmp}"], "none.py"),
        (["--config={tmp}/other.py", "--workdir={tmp}"], "must return an ip2p_jax.config.Config"),
        (["--config={tmp}/no.py", "--workdir={tmp}"], "get_config"),
    ],
)
def test_wrong_files(args, line, capsys, tmp_path):
    (tmp_path / "other.py").write_text("def get_config():\n    return {'a': 1}\n")
    (tmp_path / "no.py").write_text("a = 1\n")
    assert train.main([arg.format(config=TINY, tmp=tmp_path) for arg in args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err


def test_a_workdir_that_cannot_be_written(capsys, tmp_path):
    """Before anything is read."""
    (tmp_path / "file").touch()
    assert train.main([f"--config={TINY}", f"--workdir={tmp_path / 'file' / 'run'}"]) == 2
    assert f"no file can be made in {tmp_path / 'file'} (" in capsys.readouterr().err


def test_no_other_hosts(capsys, tmp_path, monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(train.jax.distributed, "initialize", initialize)
    assert train.main([f"--config={TINY}", f"--workdir={tmp_path / 'w'}", "--distributed"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --distributed: coordinator_address should") and "Slurm" in err
    assert err.count("\n") == 1 and not (tmp_path / "w").exists()


def test_flatten():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": [3]}
    assert config.flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": [3]}
    flat = config.flatten(Config())
    assert flat["optim.lr"] == 1e-4 and flat["model.dims.unet.channels"][0] == 320


def test_help(capsys):
    assert train.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--config.optim.lr=0.0001\n" in out and "--override=KEY" in out

    def leaves(tree) -> int:
        values = [getattr(tree, x.name) for x in dataclasses.fields(tree)]
        return sum(leaves(x) if dataclasses.is_dataclass(x) else 1 for x in values)

    assert out.count("  --config.") >= leaves(Config())
