# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run: one tree of dataclasses, and how a command line becomes one.

Defaults are the paper's recipe (section 3.2 and the released code); files under configs/ are short
deltas on it.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ip2p_jax.models.presets import ModelConfig


@dataclass
class Data:
    """Where pairs come from and how they are cut."""

    path: str = ""  # folder written by data_gen.pack
    split: str = "train"  # train, validation or test
    fraction: float = 1.0  # share of the split's prompts that is used; smaller ones lie in larger
    batch_size: int = 256  # rows of a micro-batch, over all hosts
    resolution: int = 256  # side of the square pictures, px
    resize_min: int = 0  # both pictures are resized to a square between this and
    resize_max: int = 0  # this, px, then cut to `resolution`; 0: `resolution`
    flip: float = 0.5  # how often both pictures of a pair are mirrored
    workers: int = 0  # reading processes of each host; 0: threads only
    threads: int = 8  # reading threads in each process, one batch each
    check_hashes: bool = False  # compare the shards' contents, not only their lengths, at the start


@dataclass
class Model:
    """What is trained, and where its parts come from.

    A *model* below is a hub id, a diffusers folder, an LDM single file, a run directory or the name
    of an embedded model.
    """

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # model to start from; "": scratch
    dims: ModelConfig = field(default_factory=ModelConfig)  # dimensions of a start from scratch
    prediction: str = "epsilon"  # what a start from scratch predicts: epsilon or v_prediction
    vae: str = ""  # model or VAE run whose frozen VAE is used; "": that of `base`
    tokenizer: str = ""  # folder with vocab.json and merges.txt; "": that of `base`
    train_text: bool = False  # train the text tower with the UNet (small models only)


@dataclass
class Objective:
    """What is minimised: "edit" (InstructPix2Pix, section 3) or "vae" (Rombach et al. 2022)."""

    kind: str = "edit"
    drop_rate: float = 0.05  # edit: text only, both and image only are dropped this often, each
    kl_weight: float = 1e-6  # vae: weight of the KL term, both terms summed over a picture


@dataclass
class Optim:
    """AdamW with a constant rate after `warmup` optimizer steps; EMA of the parameters."""

    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 0  # optimizer steps over which the rate rises linearly from 0
    accumulate: int = 4  # micro-batches (of data.batch_size) an optimizer step averages over
    ema_decay: float = 0.9999  # upper bound; (1 + n) / (10 + n) at micro-batch n while below it


@dataclass
class Mesh:
    """Devices along the two axes; -1: all that the other axis leaves."""

    data: int = 1  # batch is split, parameters are copied
    fsdp: int = -1  # batch and parameters are split


@dataclass
class Checkpoint:
    """Checkpoints under DIR/checkpoints. The last step is always saved."""

    every: int = 1000  # steps between checkpoints
    keep: int = 3  # the newest that are kept


@dataclass
class Log:
    """Lines in metrics.jsonl and on TensorBoard; pictures."""

    every: int = 50  # steps a line averages over
    samples_every: int = 1000  # steps between grids of samples; 0: none
    samples: int = 8  # rows of a grid
    sample_steps: int = 20  # sampler steps of a grid's edits


@dataclass
class Config:
    """A training run. The defaults are the paper's: 10,000 optimizer steps of 4 micro-batches."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    steps: int = 40_000  # micro-batches
    seed: int = 0
    dtype: str = "auto"  # of the computation: float32 or bfloat16; auto: bfloat16 but on the CPU


class Command(NamedTuple):
    """A parsed command line of `ip2p_jax.train`."""

    config: Config
    workdir: str
    override: list[str]  # keys in which the run may differ from what it stored
    distributed: bool


def parse(argv: list[str]) -> Command | None:
    """Reads `--config FILE --workdir DIR [--config.a.b=c] [--override KEY] [--distributed]`.

    Returns None for --help. Raises ValueError for anything that does not fit the tree.
    """
    if any(arg in ("--help", "-h", "-help") for arg in argv):
        return None
    from ml_collections import config_flags

    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    override = flags.DEFINE_multi_string("override", [], "", flag_values=values)
    distributed = flags.DEFINE_bool("distributed", False, "", flag_values=values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections' load_module
            rest = values(["train", *argv])[1:]
        cfg = config.value
    except flags.Error as error:
        raise ValueError(str(error)) from None
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--config: {error.args[0]}") from None
    if rest:
        raise ValueError(f"{rest[0]}: expected options only, see --help")
    if not values["config"].present or workdir.value is None:
        raise ValueError("--config FILE and --workdir DIR are needed, see --help")
    file = config_flags.get_config_filename(values["config"])
    if not Path(file).is_file():
        raise FileNotFoundError(f"--config {file}: no such file")
    if not isinstance(cfg, Config):
        raise ValueError("--config: get_config() must return an ip2p_jax.config.Config")
    check(cfg)
    return Command(cfg, workdir.value, override.value, distributed.value)


def one_of(*allowed: str) -> tuple[str, Callable[[str], bool]]:
    """What is expected of a setting that is one of a few words, and whether one fits."""
    return f"one of {', '.join(allowed)}", lambda x: x in allowed


COUNTS = (
    "steps optim.accumulate data.batch_size data.resolution data.threads checkpoint.every "
    "checkpoint.keep log.every log.samples log.sample_steps"
)
OFF_AT_0 = "optim.warmup data.resize_min data.resize_max data.workers log.samples_every"
RULES = (
    ("1 or more", lambda x: x >= 1, COUNTS),
    ("0 or more", lambda x: x >= 0, OFF_AT_0),
    ("a number above 0", lambda x: 0 < x < math.inf, "optim.lr optim.eps"),
    ("0 or more", lambda x: 0 <= x < math.inf, "optim.weight_decay objective.kl_weight"),
    ("0 or more, below 1", lambda x: 0 <= x < 1, "optim.b1 optim.b2 optim.ema_decay"),
    ("0 to 1", lambda x: 0 <= x <= 1, "data.flip"),
    ("over 0, up to 1", lambda x: 0 < x <= 1, "data.fraction"),
    ("0 to 1/3", lambda x: 0 <= x <= 1 / 3, "objective.drop_rate"),
    ("0 to 2^32 - 1", lambda x: 0 <= x < 2**32, "seed"),
    (*one_of("edit", "vae"), "objective.kind"),
    (*one_of("epsilon", "v_prediction"), "model.prediction"),
    (*one_of("auto", "float32", "bfloat16"), "dtype"),
)
"""What is expected, whether a value fits, and of which settings. What depends on the networks, the
devices or the data is checked where these are known."""


def check(cfg: Config) -> None:
    """Raises ValueError, one line that names config.X, for values that no run can have."""
    values = flatten(cfg)
    for expected, fits, names in RULES:
        for name in names.split():
            if not fits(values[name]):
                raise ValueError(f"config.{name} is {values[name]!r}, expected {expected}")
    if cfg.steps % cfg.optim.accumulate:
        raise ValueError(
            f"config.steps is {cfg.steps}, expected a multiple of config.optim.accumulate, "
            f"{cfg.optim.accumulate}"
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}}, or the dataclass of that shape -> {"optim.lr": 1}."""
    if dataclasses.is_dataclass(tree):
        tree = {item.name: getattr(tree, item.name) for item in dataclasses.fields(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def describe(cfg: Config) -> list[str]:
    """Lists every key of the tree with its value, one a line."""
    return [f"  --config.{name}={value!r}" for name, value in flatten(cfg).items()]
