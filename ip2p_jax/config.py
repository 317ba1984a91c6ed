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

from ip2p_jax.models.presets import CLIPConfig, ModelConfig


@dataclass
class Data:
    """Where pairs come from and how they are cut."""

    path: str = ""  # folder written by data_gen.pack or ip2p_jax.cache_latents
    mix: str = ""  # more of them, FOLDER:WEIGHT,...: rows of each to one of `path`
    split: str = "train"  # train, validation or test
    fraction: float = 1.0  # share of the split's prompts that is used; smaller ones lie in larger
    batch_size: int = 1024  # rows of an optimizer step, over all hosts
    resolution: int = 256  # side of the square pictures, px
    resize_min: int = 0  # both pictures are resized to a square between this and
    resize_max: int = 0  # this, px, then cut to `resolution`; 0: `resolution`
    buckets: str = ""  # WIDTHxHEIGHT,... px: what pictures are cut to, by their shape, in place of
    # the square; resize_min and resize_max then enlarge their sides as they would `resolution`
    flip: float = 0.5  # how often both pictures of a pair are mirrored
    workers: int = 0  # reading processes of each host; 0: threads only
    threads: int = 8  # reading threads in each process, one batch each
    broken: float = 0.01  # share of records that may be broken; each is replaced by another
    check_hashes: bool = False  # compare the shards' contents, not only their lengths, at the start


@dataclass
class Model:
    """What is trained, and where its parts come from.

    A *model* below is a hub id, a diffusers folder, an LDM single file, a run directory or the name
    of an embedded model.
    """

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # model to start from; "": scratch
    dims: ModelConfig = field(default_factory=ModelConfig)  # dimensions of a start from scratch
    clip: CLIPConfig = field(default_factory=CLIPConfig)  # the same of a CLIP
    prediction: str = "epsilon"  # what a start from scratch predicts: epsilon or v_prediction
    zero_terminal_snr: bool = False  # a start from scratch: no signal at the last timestep (Lin et
    # al. 2024); needs v_prediction, and sampling by ddim
    vae: str = ""  # model or VAE run whose frozen VAE is used; "": that of `base`. To train a VAE:
    # one whose encoder stays, so that latents do, while its decoder is trained on; "": scratch
    tokenizer: str = ""  # folder with vocab.json and merges.txt; "": that of `base`
    train_text: bool = False  # train the text tower with the UNet (small models only)


@dataclass
class Objective:
    """What is minimised: "edit" (InstructPix2Pix, section 3), "generate" (text-to-image) or "vae"
    (both Rombach et al. 2022), or "clip" (Radford et al. 2021)."""

    kind: str = "edit"
    drop_rate: float = 0.05  # edit: text only, both and image only are dropped this often, each;
    # generate: texts are dropped twice as often, as they are in all when editing
    timestep_shift: float = 1.0  # edit, generate: above 1, noisy timesteps are drawn more often
    # (Esser et al. 2024 have 3); 1: all alike
    min_snr_gamma: float = 0.0  # edit, generate: bound of a timestep's weight (Hang et al. 2023
    # have 5); 0: all timesteps weigh alike
    offset_noise: float = 0.0  # edit, generate: share of noise that is the same all over a channel
    # (0.05 to 0.1 is usual); 0: none
    kl_weight: float = 1e-6  # vae: weight of the KL term, both terms summed over a picture


@dataclass
class Lora:
    """Additions of low rank to the UNet's layers (Hu et al. 2022); nothing else is trained then.

    From a text-to-image model `conv_in` has to be one: its channels for the image start at zero.
    """

    rank: int = 0  # of each addition; 0: the whole UNet is trained
    alpha: float = 16.0  # additions are multiplied by alpha / rank
    targets: str = "attn+conv_in"  # layers: attn, ff, or what diffusers' names end in (to_q)


@dataclass
class Optim:
    """The optimizer, which is the paper's AdamW with a constant rate; EMA of the parameters."""

    name: str = "adamw"  # adamw, or adafactor, whose state takes next to no memory
    lr: float = 1e-4  # adafactor: relative to the root mean square of each array
    b1: float = 0.9  # adamw
    b2: float = 0.999  # adamw
    eps: float = 1e-8  # adamw
    weight_decay: float = 0.01
    clip: float = 0.0  # bound of the gradient's norm over all parameters; 0: none
    warmup: int = 0  # steps over which the rate rises linearly from 0
    cosine_steps: int = 0  # steps after which it has fallen to 0 by half a cosine; 0: it stays
    accumulate: int = 4  # micro-batches that a step is cut into: what is in memory at once
    ema_decay: float = 0.9999  # upper bound; (1 + n) / (10 + n) at micro-batch n while below it
    max_skipped: int = 10  # steps in a row that are not finite, and skipped, before the run ends


@dataclass
class Mesh:
    """Devices along the two axes; -1: all that the other axis leaves."""

    data: int = 1  # batch is split, parameters are copied
    fsdp: int = -1  # batch and parameters are split


@dataclass
class Checkpoint:
    """Checkpoints under DIR/checkpoints. The last step is always saved."""

    every: int = 1000  # steps between checkpoints
    keep: int = 3  # the newest that are kept; with 1 there is none to fall back on


@dataclass
class Log:
    """Lines in metrics.jsonl and on TensorBoard; pictures."""

    every: int = 50  # steps a line averages over
    validation_every: int = 0  # steps between losses of the EMA on the validation split; 0: none
    validation_batches: int = 4  # micro-batches of it, always the same, with the same noise
    profile_at: int = 0  # step at which DIR/profile is recorded; 0: never
    profile_steps: int = 3  # that are recorded
    wandb: str = ""  # project of Weights & Biases that gets the lines too (pip install wandb)
    samples_every: int = 1000  # steps between grids of samples; 0: none
    samples: int = 8  # rows of a grid
    sample_steps: int = 20  # sampler steps of a grid's edits


@dataclass
class Config:
    """A training run. The defaults are the paper's: 10,000 steps of 1024 pairs."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    steps: int = 10_000  # of the optimizer
    seed: int = 0
    watchdog: int = 1800  # seconds without a finished step after which the run ends; 0: never
    heartbeat: int = 60  # seconds of silence after which the other hosts give up on a host
    remat: str = "none"  # edit, generate: what of the UNet is computed again for the gradient, to
    # save memory: none, blocks (each one twice) or full (three times)
    dtype: str = "auto"  # of the computation: float32 or bfloat16; auto: bfloat16 but on the CPU


class Hosts(NamedTuple):
    """How the hosts of a run find each other: from what is around, or by what the options say."""

    distributed: bool = False
    coordinator: str = ""  # ADDRESS:PORT of host 0
    hosts: int = 1
    host: int = 0


class Command(NamedTuple):
    """A parsed command line of `ip2p_jax.train`."""

    config: Config
    workdir: str
    override: list[str]  # keys in which the run may differ from what it stored
    hosts: Hosts
    dry_run: bool
    push: str  # USER/NAME of the hub that the run is published as


def parse(argv: list[str]) -> Command | None:
    """Reads `--config FILE --workdir DIR [--config.a.b=c] [--override KEY] [--dry-run] [--push
    NAME]` and those of `Hosts`.

    Returns None for --help. Raises ValueError for anything that does not fit the tree.
    """
    if any(arg in ("--help", "-h", "-help") for arg in argv):
        return None
    from ml_collections import config_flags

    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    override = flags.DEFINE_multi_string("override", [], "", flag_values=values)
    dry_run = flags.DEFINE_bool("dry-run", False, "", flag_values=values)
    push = flags.DEFINE_string("push", "", "", flag_values=values)
    hosts = [
        flags.DEFINE_bool("distributed", False, "", flag_values=values),
        flags.DEFINE_string("coordinator", "", "", flag_values=values),
        flags.DEFINE_integer("hosts", 1, "", flag_values=values),
        flags.DEFINE_integer("host", 0, "", flag_values=values),
    ]
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
    around = Hosts(*(option.value for option in hosts))
    return Command(cfg, workdir.value, override.value, around, dry_run.value, push.value)


def one_of(*allowed: str) -> tuple[str, Callable[[str], bool]]:
    """What is expected of a setting that is one of a few words, and whether one fits."""
    return f"one of {', '.join(allowed)}", lambda x: x in allowed


COUNTS = (
    "steps optim.accumulate optim.max_skipped data.batch_size data.resolution data.threads "
    "checkpoint.every checkpoint.keep log.every log.samples log.sample_steps log.profile_steps "
    "log.validation_batches heartbeat"
)
OFF_AT_0 = (
    "lora.rank optim.warmup optim.cosine_steps data.resize_min data.resize_max data.workers "
    "log.samples_every log.validation_every log.profile_at watchdog"
)
RULES = (
    ("1 or more", lambda x: x >= 1, COUNTS),
    ("0 or more", lambda x: x >= 0, OFF_AT_0),
    (
        "a number above 0",
        lambda x: 0 < x < math.inf,
        "lora.alpha optim.lr optim.eps objective.timestep_shift",
    ),
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        "optim.weight_decay optim.clip objective.kl_weight "
        "objective.min_snr_gamma objective.offset_noise",
    ),
    ("0 or more, below 1", lambda x: 0 <= x < 1, "optim.b1 optim.b2 optim.ema_decay"),
    ("0 to 1", lambda x: 0 <= x <= 1, "data.flip data.broken"),
    ("over 0, up to 1", lambda x: 0 < x <= 1, "data.fraction"),
    ("0 to 1/3", lambda x: 0 <= x <= 1 / 3, "objective.drop_rate"),
    ("0 to 2^32 - 1", lambda x: 0 <= x < 2**32, "seed"),
    ("a folder of data_gen.pack", bool, "data.path"),
    (*one_of("edit", "generate", "vae", "clip"), "objective.kind"),
    (*one_of("none", "blocks", "full"), "remat"),
    (*one_of("adamw", "adafactor"), "optim.name"),
    (*one_of("epsilon", "v_prediction"), "model.prediction"),
    (*one_of("auto", "float32", "bfloat16"), "dtype"),
)
"""What is expected, whether a value fits, and of which settings. What depends on the networks, the
devices or the data is checked where these are known."""


def check(cfg: Config) -> None:
    """Raises ValueError, one line that names config.X, for values that no run can have."""
    values, lowest = flatten(cfg), cfg.data.resize_min or cfg.data.resolution
    highest = cfg.data.resize_max or cfg.data.resolution
    for expected, fits, names in RULES:
        for name in names.split():
            if not fits(values[name]):
                raise ValueError(f"config.{name} is {values[name]!r}, expected {expected}")
    if 0 < cfg.optim.cosine_steps <= cfg.optim.warmup:
        raise ValueError(
            f"config.optim.cosine_steps is {cfg.optim.cosine_steps}, expected 0 or more than "
            f"config.optim.warmup, {cfg.optim.warmup}"
        )
    if cfg.objective.kind in ("vae", "clip") and cfg.model.base:
        raise ValueError(
            f"config.model.base is {cfg.model.base!r}, expected '': objective.kind="
            f"{cfg.objective.kind} trains no part of it"
        )
    if not cfg.data.resolution <= lowest <= highest:
        raise ValueError(
            f"config.data.resize_min is {lowest}, config.data.resize_max {highest}: expected at "
            f"least config.data.resolution={cfg.data.resolution}, and the first not above the other"
        )
    if cfg.model.zero_terminal_snr and cfg.model.prediction != "v_prediction":
        raise ValueError(
            "config.model.zero_terminal_snr needs config.model.prediction=v_prediction"
        )
    check_used(cfg)
    if cfg.objective.kind == "clip":
        check_clip(cfg)
    if cfg.lora.rank:
        check_lora(cfg)
    folders(cfg.data)


DIFFUSION = (
    "objective.drop_rate objective.timestep_shift objective.min_snr_gamma objective.offset_noise "
    "remat log.sample_steps model.train_text model.prediction model.zero_terminal_snr"
)
SCRATCH = "model.prediction model.zero_terminal_snr"
KL = "objective.kl_weight"
LORA = "lora.alpha lora.targets"
ADAM = "optim.b1 optim.b2 optim.eps"
"""Settings that only some runs have a use for: those of a UNet, without a base, of a new
encoder, of a LoRA, by AdamW."""


def check_used(cfg: Config) -> None:
    """Raises ValueError, one line, for a setting that is not the default and has no effect.
    Dimensions may stay where a base, or the kind, makes them needless: they are those of a file."""
    kind, values, defaults = cfg.objective.kind, flatten(cfg), flatten(Config())
    of_kind = f"with config.objective.kind={kind}"
    for used, where, names in (
        (kind in ("edit", "generate"), of_kind, DIFFUSION),
        (kind == "vae", of_kind, KL),
        (kind != "vae" or not cfg.model.vae, "on the decoder of config.model.vae", KL),
        (kind != "clip", of_kind, "model.vae"),
        (kind != "vae", of_kind, "model.tokenizer"),
        (not cfg.model.base, "with a config.model.base", SCRATCH),
        (cfg.lora.rank > 0, "without config.lora.rank", LORA),
        (cfg.optim.name == "adamw", f"with config.optim.name={cfg.optim.name}", ADAM),
    ):
        for name in () if used else names.split():
            if values[name] != defaults[name]:
                raise ValueError(f"config.{name} is {values[name]!r}, without effect {where}")


def check_clip(cfg: Config) -> None:
    """Raises ValueError for what a CLIP cannot be trained with."""
    if not cfg.model.tokenizer:
        raise ValueError("config.model.tokenizer is empty, expected a folder: a CLIP needs one")
    if cfg.optim.accumulate != 1:
        raise ValueError(
            f"config.optim.accumulate is {cfg.optim.accumulate}, expected 1: the loss of a CLIP "
            "compares all rows of a step"
        )


def check_lora(cfg: Config) -> None:
    """Raises ValueError where a LoRA is asked for, and there is no frozen model to add it to."""
    wrong = {
        "config.objective.kind=edit or generate": cfg.objective.kind not in ("edit", "generate"),
        "config.model.base": not cfg.model.base,
        "config.model.train_text=False": cfg.model.train_text,
    }
    for needed, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"config.lora.rank is {cfg.lora.rank}: a LoRA needs {needed}")


def folders(data: Data) -> dict[str, float]:
    """The data sets that are mixed, with their weights: that of `data.path` is 1.

    Raises ValueError, one line that names config.data.mix.
    """
    weights = {data.path: 1.0}
    for part in data.mix.split(",") if data.mix else ():
        folder, _, number = part.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not folder or folder in weights or not 0 < weight < math.inf:
            raise ValueError(
                f"config.data.mix: {part!r}, expected FOLDER:WEIGHT, another folder and a number "
                "above 0"
            )
        weights[folder] = weight
    return weights


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
