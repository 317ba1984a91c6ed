# SPDX-License-Identifier: Apache-2.0
"""Converts a model to a diffusers folder or to an LDM single file; exports a LoRA, CLIP or VAE.

  python -m ip2p_jax.convert --from runs/edit --to my-editor --format diffusers
  python -m ip2p_jax.convert --from instruct-pix2pix-00-22000.ckpt --to ip2p --format diffusers
  python -m ip2p_jax.convert --from timbrooks/instruct-pix2pix --to ip2p.safetensors \\
      --format ldm --dtype float16
  python -m ip2p_jax.convert --from M --lora FILE:0.8 --to merged --format diffusers
  python -m ip2p_jax.convert --from runs/lora --to pytorch_lora_weights.safetensors --format lora
  python -m ip2p_jax.convert --from runs/clip --to my-clip --format clip
  python -m ip2p_jax.convert --from runs/vae --to my-vae --format vae

Of a run directory the EMA of its latest checkpoint is converted, of an LDM file its EMA weights if
it has any. A run that trained a LoRA is a model with it merged; --format lora writes what was
trained alone, for diffusers' load_lora_weights. --format clip writes a folder for transformers'
CLIPModel, --format vae the VAE of a model, or of a run that trained one, for diffusers'
AutoencoderKL. An existing path is never overwritten.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ip2p_jax.cli import Parser, check_writable, one_line_errors
from ip2p_jax.jobs import add_lora
from ip2p_jax.weights import lora
from ip2p_jax.weights.clip import load_clip
from ip2p_jax.weights.load import load, load_adapter, load_vae
from ip2p_jax.weights.save import save_clip, save_diffusers, save_ldm, save_vae, size

FORMATS = {"diffusers": save_diffusers, "ldm": save_ldm}
DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m ip2p_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--from",
        dest="model",
        required=True,
        metavar="M",
        help="hub id, diffusers folder, LDM .safetensors or .ckpt, run directory, embedded model",
    )
    p.add_argument("--to", required=True, type=Path, metavar="PATH", help="must not exist yet")
    p.add_argument("--format", required=True, choices=[*FORMATS, *ALONE], help="what PATH becomes")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument("--variant", help="of the files to read, e.g. fp16")
    p.add_argument("--vae", metavar="M", help="take the VAE from here: as --from, or a VAE alone")
    add_lora(p)
    return p


def export_alone(args: argparse.Namespace) -> None:
    """Writes what a run trained; ValueError for options that say what a whole model becomes."""
    for name in ("revision", "variant", "vae", "lora"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name}: expected without --format {args.format}, which takes a run's own"
            )
    ALONE[args.format](args.model, args.to, DTYPES[args.dtype])


def export_lora(model: str, path: Path, dtype: DTypeLike) -> None:
    lora.write(load_adapter(model), path, dtype=dtype)


def export_clip(model: str, path: Path, dtype: DTypeLike) -> None:
    save_clip(load_clip(model), path, dtype=dtype)


def export_vae(model: str, path: Path, dtype: DTypeLike) -> None:
    save_vae(*load_vae(model), path, dtype=dtype)


ALONE = {"lora": export_lora, "clip": export_clip, "vae": export_vae}
"""What stands alone beside a model."""


def convert(args: argparse.Namespace) -> None:
    """Reads the model, then writes it with a progress bar."""
    model = load(
        args.model,
        revision=args.revision,
        variant=args.variant,
        safety=True,
        vae=args.vae,
        lora=args.lora or (),
    )
    dtype, console = DTYPES[args.dtype], Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"writing {args.to}", total=size(model, dtype))
        FORMATS[args.format](
            model, args.to, dtype=dtype, progress=lambda count: bar.advance(task, count)
        )


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Writes PATH, whole or not at all, and prints where."""
    args = parser().parse_args(argv)
    if args.to.exists():
        raise ValueError(f"--to {args.to}: is already there")
    check_writable(args.to.parent)
    if args.format in ("ldm", "lora") and args.to.suffix != ".safetensors":
        raise ValueError(f"--to {args.to}: expected a name that ends in .safetensors")
    (export_alone if args.format in ALONE else convert)(args)
    print(args.to)


if __name__ == "__main__":
    raise SystemExit(main())
