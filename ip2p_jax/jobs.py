# SPDX-License-Identifier: Apache-2.0
"""What the commands that make pictures share: options, only what is missing, settings in PNGs.

A request is a frozen dataclass that says how one picture is made; it has `output`, `steps` and
`sampler` at least.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ip2p_jax import checks, config
from ip2p_jax.cli import Parser, atomic_path, check_writable, set_up_jax
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.placed import Placed
from ip2p_jax.safety import SafetyChecker
from ip2p_jax.weights.load import Pretrained, load

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LONG = 30 * 24 * 3600  # seconds
METADATA = "ip2p_jax"  # the PNG's text chunk that holds the settings, as JSON
MODEL_OPTIONS = ("model", "revision", "variant", "vae", "lora", "dtype", "safety")
MODELS = (
    "a hub id, a diffusers folder, an LDM .safetensors or .ckpt, a run directory, or the name of "
    "an embedded model"
)

Request = Any
Due = dict[Request, dict[str, Any]]
"""The requests that are still to be met, each with the settings for its PNG."""

Make = Callable[[Sequence[Request]], tuple[dict[Request, Image.Image], list[str]]]
"""Makes the pictures of a batch; also says why some of them cannot be made."""


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Begins a command line with the options that choose the model."""
    p = Parser(
        prog=f"python -m {prog}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, help=MODELS)
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument("--variant", help="variant of the weights' files, e.g. fp16")
    p.add_argument(
        "--vae",
        metavar="M",
        help="take the VAE from here: a model as above, or the folder or hub id of a VAE alone",
    )
    add_lora(p)
    p.add_argument("--dtype", choices=DTYPES, help="float32 on CPU, else bfloat16")
    return p


def add_lora(p: argparse.ArgumentParser) -> None:
    """Adds the option that merges adapters into the model."""
    p.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="merge this LoRA (.safetensors) into the model, SCALE times (1); may be repeated",
    )


def add_safety(p: argparse.ArgumentParser) -> None:
    """Adds the option that asks for the model's own checker."""
    p.add_argument("--safety", action="store_true", help="black out what the model's checker flags")


def add_hosts(p: argparse.ArgumentParser) -> None:
    """Adds the options with which several hosts share the work and its folder."""
    p.add_argument("--distributed", action="store_true", help="several hosts, as found around")
    p.add_argument("--hosts", type=int, default=1, help="several hosts, without --distributed")
    p.add_argument("--host", type=int, default=0, help="which of --hosts this is, from 0")


def this_host(args: argparse.Namespace) -> tuple[int, int]:
    """Which host this is, of how many; joins the others if --distributed says so.

    Raises ValueError for options that do not go together, or where no hosts are found.
    """
    if args.hosts < 1:
        raise ValueError(f"--hosts {args.hosts}: expected at least 1")
    if not 0 <= args.host < args.hosts:
        raise ValueError(f"--host {args.host}: expected 0 to {args.hosts - 1}")
    if not args.distributed:
        return args.host, args.hosts
    if args.hosts > 1:
        raise ValueError("--distributed: expected without --hosts and --host")
    find_hosts(LONG)  # one that is done early waits for the others
    return jax.process_index(), jax.process_count()


def join(hosts: config.Hosts, heartbeat: int) -> bool:
    """Joins the other hosts of a run, if there are any; returns whether there are.

    A host that is silent for `heartbeat` seconds ends the others. Raises ValueError for options
    that do not go together, or where no hosts are found.
    """
    if hosts.hosts < 1 or not 0 <= hosts.host < hosts.hosts:
        raise ValueError(f"--host {hosts.host} of --hosts {hosts.hosts}: expected 0 to hosts - 1")
    if hosts.distributed and (hosts.hosts > 1 or hosts.coordinator):
        raise ValueError("--distributed: expected without --coordinator, --hosts and --host")
    if (hosts.hosts > 1) != bool(hosts.coordinator):
        raise ValueError("--coordinator ADDRESS:PORT and --hosts: expected together")
    if hosts.distributed:
        find_hosts(heartbeat=heartbeat)
    elif hosts.coordinator:
        if not hosts.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"--coordinator {hosts.coordinator}: expected ADDRESS:PORT")
        jax.distributed.initialize(
            coordinator_address=hosts.coordinator,
            num_processes=hosts.hosts,
            process_id=hosts.host,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
        )
    return hosts.distributed or bool(hosts.coordinator)


def find_hosts(wait: int = 300, heartbeat: int = 100) -> None:
    """Joins the other hosts, for whose end this one will wait so many seconds.

    Raises ValueError where the surroundings do not tell which they are.
    """
    try:
        jax.distributed.initialize(
            shutdown_timeout_seconds=wait, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:
        known = "TPU pods, Slurm, Open MPI and Kubernetes"
        raise ValueError(f"--distributed: {error} Hosts are found on {known}.") from None


def add_sampling(p: argparse.ArgumentParser, request: type[Request]) -> None:
    """Adds the options of sampling, with the defaults of `request`."""
    p.add_argument("--steps", type=int, default=request.steps, help="sampling steps (%(default)s)")
    p.add_argument("--sampler", default=request.sampler, help=", ".join(SAMPLERS))
    p.add_argument(
        "--text-guidance",
        type=float,
        default=request.text_guidance,
        help="s_T, useful 5 to 10 (%(default)s)",
    )
    p.add_argument(
        "--guidance-rescale",
        type=float,
        default=request.guidance_rescale,
        help="0 to 1, takes back contrast that guidance adds, e.g. 0.7 (%(default)s)",
    )
    add_interval(p)
    p.add_argument(
        "--seed", type=int, default=request.seed, help="another seed, another picture (%(default)s)"
    )
    p.add_argument("--negative", default=request.negative, help="what the result should not be")


def add_interval(p: argparse.ArgumentParser) -> None:
    """Adds the option that says where guidance acts."""
    p.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels between which guidance acts, e.g. 0.28 5.42: faster (all)",
    )


def check_png(x: Any) -> str | None:
    return None if isinstance(x, str) and Path(x).suffix.lower() == ".png" else "a .png file"


SAMPLING: dict[str, checks.Check] = {
    "output": check_png,
    "steps": checks.steps,
    "sampler": checks.sampler,
    "text_guidance": checks.number,
    "guidance_rescale": checks.share,
    "guidance_interval": checks.interval,
    "seed": checks.seed,
    "negative": checks.text,
}
"""What these fields of a request have to be."""


def outputs_of(names: Sequence[str], output: str) -> list[str]:
    """Where pictures go: to the file `output`, or as `names` into the folder `output`."""
    path = Path(output)
    if path.is_dir() or output.endswith("/") or not path.suffix:
        return [str(path / f"{name}.png") for name in names]
    if len(names) > 1:
        raise ValueError(f"--output: {output}, expected a folder for several pictures")
    return [output]


def check_outputs(outputs: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Makes sure that every output can be written, so that none fails after hours of work."""
    read = {Path(x).resolve() for x in inputs}
    uses = Counter(Path(x).resolve() for x in outputs)
    for output in outputs:
        path = Path(output).resolve()
        if path in read:
            raise ValueError(f"output {output}: is an input too")
        if uses[path] > 1:
            raise ValueError(f"output {output}: is named twice")
        if path.is_dir():
            raise ValueError(f"output {output}: is a folder")
    for folder in {path.parent for path in uses}:
        check_writable(folder)


def settings(args: argparse.Namespace, request: Request) -> dict[str, Any]:
    """What the PNG's metadata says of how it was made."""
    return {name: getattr(args, name) for name in MODEL_OPTIONS} | asdict(request)


def is_done(output: str, made: dict[str, Any]) -> bool:
    """Whether the output is there and was made with these settings."""
    try:
        with Image.open(output, formats=("PNG",)) as image:
            return json.loads(image.info.get(METADATA, "{}")) == json.loads(json.dumps(made))
    except (OSError, ValueError, Image.DecompressionBombError):
        return False  # not there, or not ours


def missing(args: argparse.Namespace, requests: Sequence[Request]) -> Due:
    """The requests whose output is not there, or was made with other settings."""
    wanted = {request: settings(args, request) for request in requests}
    due = {request: made for request, made in wanted.items() if not is_done(request.output, made)}
    if not due:
        print(f"all {len(requests)} pictures are there", file=sys.stderr)
    return due


def open_model(
    args: argparse.Namespace, build: Callable[..., Any], console: Console
) -> tuple[Any, SafetyChecker | None]:
    """What `build` (Editor or Generator) makes of the model, and its safety checker if wanted."""
    set_up_jax()
    with console.status(escape(f"loading {args.model}")):
        pretrained = load_model(args)
        checker = SafetyChecker.from_pretrained(pretrained) if args.safety else None
        return build(pretrained, dtype=DTYPES.get(args.dtype)), checker


def load_model(args: argparse.Namespace) -> Pretrained:
    """Opens the model that the options name; its safety checker too, if --safety is one of them."""
    return load(
        args.model,
        revision=args.revision,
        variant=args.variant,
        vae=args.vae,
        lora=args.lora or (),
        safety=getattr(args, "safety", False),
    )


def side_of(resolution: int | None, config: ModelConfig) -> int:
    """The side of square pictures, by default the model's own.

    Raises ValueError for one that the networks do not take.
    """
    side = config.unet.sample_size * config.vae.factor if resolution is None else resolution
    if side < 1 or side % config.multiple:
        raise ValueError(f"--resolution {side}: expected a multiple of {config.multiple} px")
    return side


def check_grids(requests: Collection[Request], model: Placed) -> None:
    """Raises ValueError if the model refuses a sampler or a number of steps."""
    for steps, sampler in sorted({(r.steps, r.sampler) for r in requests}):
        model.grid(sampler, steps)


def units(
    requests: Sequence[Request],
    due: Collection[Request],
    most: int,
    together: Callable[[Request], Any] = lambda request: None,
) -> list[list[Request]]:
    """Cuts the requests into batches of `most` by their place; those of which any is due.

    A batch of which anything is due is computed as a whole, so that its pictures are the same bit
    for bit however often the work was interrupted. `together` is what a batch has in common.
    """
    groups: dict[Any, list[Request]] = {}
    for request in requests:
        groups.setdefault(together(request), []).append(request)
    batches = [g[i : i + most] for g in groups.values() for i in range(0, len(g), most)]
    due = set(due)
    return [batch for batch in batches if not due.isdisjoint(batch)]


def run(
    title: str, batches: Sequence[Sequence[Request]], due: Due, make: Make, console: Console
) -> list[str]:
    """Makes batch by batch, and writes what is due. Returns why pictures could not be made."""
    failures: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=sum(map(len, batches)))
        for batch in batches:
            images, reasons = make(batch)
            failures += reasons
            for request, image in images.items():
                if request in due:
                    write(image, Path(request.output), due[request])
            progress.advance(task, len(batch))
    return failures


def watch(what: str, counts: Iterable[int], total: int, due: int, console: Console) -> None:
    """Shows a progress bar while `counts` is gone through: so many of `what` were made each time.
    `due` of the `total` are still to be made."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]:.2f}} {what}/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=total - due, rate=0.0)
        begin, made = time.monotonic(), 0
        for count in counts:
            made += count
            progress.update(task, advance=count, rate=made / (time.monotonic() - begin))


def write(image: Image.Image, path: Path, made: dict[str, Any]) -> None:
    """Writes a PNG with its settings in the metadata, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA, json.dumps(made))
    try:
        with atomic_path(path) as part:
            image.save(part, "PNG", pnginfo=info)
    except OSError as error:
        raise ValueError(f"output {path}: not written ({error.strerror or error})") from error
