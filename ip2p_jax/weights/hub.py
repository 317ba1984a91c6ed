# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a model to files on this machine: paths, embedded models, hub ids."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from etils import epath
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

ASSETS = Path(__file__).parent.parent / "assets"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
}
"""Folders of a diffusers model that hold weights, and what their files are called."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
CLIP = ("config.json", *TOKENIZER)
CLIP_SAFETENSORS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
)
CLIP_PICKLED = "pytorch_model.bin"
"""Files of a CLIP of transformers; the pickled ones of some repositories are the only ones."""


def embedded() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def embedded_clips() -> list[str]:
    """Names of the CLIPs that ship with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def locate(model: str, revision: str | None, wanted: list[str]) -> Path:
    """Returns the file or folder of `model`, downloading the files `wanted` of a hub id.

    An embedded model's name comes first (`./photos` is the folder), then paths, then hub ids.

    Raises:
      FileNotFoundError: there is no such thing, or no way to get it.
    """
    if model in embedded():
        return ASSETS / model
    if "://" in model:
        return fetch(epath.Path(model))
    path = Path(model).expanduser()
    if path.exists():
        return path
    if HUB_ID.fullmatch(model) and path.suffix not in (".safetensors", ".ckpt"):
        return download(model, revision, wanted)
    raise FileNotFoundError(
        f"{model}: no such file or folder, not a hub id (owner/name), and not an embedded model "
        f"({', '.join(embedded()) or 'none'})"
    )


def locate_clip(model: str, revision: str | None) -> Path:
    """Returns the file or folder of a CLIP, or of another model that transformers keeps under the
    same file names, downloading what is needed of a hub id. An embedded CLIP's name comes first.

    Raises:
      FileNotFoundError: there is no such thing, or no way to get it.
    """
    if model in embedded_clips():
        return ASSETS / model
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(model) or path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise FileNotFoundError(f"{model}: no such file or folder, and not a hub id (owner/name)")
    folder = download(model, revision, [*CLIP, *CLIP_SAFETENSORS])
    if any(folder.glob("model*.safetensors")):
        return folder
    return download(model, revision, [*CLIP, CLIP_PICKLED])


def fetch(source: epath.Path) -> Path:
    """Copies the configuration and frozen parts of a run in a bucket to this machine.

    The checkpoints stay there: orbax restores from buckets. The copy goes when the process ends.
    """
    if not (source / "base").is_dir():
        raise FileNotFoundError(f"{source}: not a run directory (no base/ inside)")
    target = Path(tempfile.mkdtemp(prefix="ip2p_jax-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    copy_tree(source / "base", target)
    return target


def copy_tree(source: epath.Path, target: epath.Path | Path) -> None:
    """Copies a folder from or to a bucket."""
    target.mkdir(exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            item.copy(target / item.name)


def file_names(stem: str, variant: str | None) -> tuple[str, str]:
    """The weights' file of a part and, where it is sharded, its index."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"


def vae_patterns() -> list[str]:
    """What is needed of a hub repository that holds a VAE, alone or in its folder."""
    names = ["config.json", *weight_patterns("vae", None)]
    return [place + name for place in ("", "vae/") for name in names]


def patterns(variant: str | None, safety: bool) -> list[str]:
    """What of a hub repository is needed: no other variant, no other framework's weights."""
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/*"]
    wanted += ["feature_extractor/*.json"] if safety else []
    for folder in WEIGHTS:
        if folder != "safety_checker" or safety:
            names = ["config.json", *weight_patterns(folder, variant)]
            wanted += [f"{folder}/{name}" for name in names]
    return wanted


def weight_patterns(folder: str, variant: str | None) -> list[str]:
    """The weights' files of a folder: one, or an index and the shards it names."""
    stem, dot = WEIGHTS[folder], f".{variant}" if variant else ""
    names = [*file_names(stem, variant), f"{stem}-?????-of-?????{dot}.safetensors"]
    return names + ([f"{stem}{dot}-?????-of-?????.safetensors"] if variant else [])


def download(model: str, revision: str | None, wanted: list[str], kind: str = "model") -> Path:
    """Returns the local snapshot of a hub id; without network, what the cache holds of it.

    kind: of the repository, "model" or "dataset".
    """
    at = f"{model} (revision {revision})" if revision else model
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=wanted, repo_type=kind)
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{at}: no such file or folder; as a hub id it is not in the local cache, and the hub "
            "cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{at}: not to be had from the hub: {reason}") from error
