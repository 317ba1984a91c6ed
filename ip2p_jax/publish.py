# SPDX-License-Identifier: Apache-2.0
"""A run as a model on a hub: a diffusers folder with a card that says how it was made."""

import contextlib
import functools
import json
import operator
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ip2p_jax.config import Config, flatten
from ip2p_jax.training.checkpoint import as_json
from ip2p_jax.weights.load import load
from ip2p_jax.weights.save import save_diffusers

CARD = """\
---
library_name: diffusers
pipeline_tag: {task}
tags: [{tags}]
---

# {name}

{what}

Trained with ip2p_jax, InstructPix2Pix in JAX, for {steps:,} steps of {rows:,} {data}.

```python
{usage}
```

{picture}
## How it was made

What differs from the library's defaults:

| setting | value |
|---|---|
{settings}

## What was measured

The last step of the run's metrics.jsonl:

| metric | value |
|---|---|
{metrics}

## Method

InstructPix2Pix: Learning to Follow Image Editing Instructions, Tim Brooks, Aleksander Holynski,
Alexei A. Efros, CVPR 2023.
"""

KINDS = {
    "edit": ("image-to-image", "Edits pictures by written instructions.", "pairs"),
    "generate": ("text-to-image", "Makes pictures of texts.", "captioned pictures"),
}
USAGE = {
    "edit": """\
from ip2p_jax import Editor
editor = Editor.from_pretrained("{name}")
[edited] = editor(image, "make it winter")""",
    "generate": """\
from ip2p_jax.generator import Generator
generator = Generator.from_pretrained("{name}")
[picture] = generator("a photograph of a cat")""",
}


def check_push(name: str, cfg: Config) -> None:
    """Raises ValueError, one line, for what is no name on a hub, or a run that is no model."""
    if cfg.objective.kind not in KINDS:
        raise ValueError(f"--push: a run with objective.kind={cfg.objective.kind} is no model")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name}: expected USER/NAME ({error})") from None
    if "/" not in name:
        raise ValueError(f"--push {name}: expected USER/NAME")


@contextlib.contextmanager
def refused(name: str) -> Iterator[None]:
    """Whatever the hub's client raises (no token, no right, no network) as an OSError, one line."""
    try:
        yield
    except Exception as error:  # its classes come from whichever HTTP library it uses
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(f"--push {name}: {reason}") from None


def open_repository(name: str) -> None:
    """Creates the model `name` on the hub if it is not there: a run learns first whether it may.

    Raises OSError, one line, if the hub refuses or is not reached.
    """
    with refused(name):
        HfApi().create_repo(name, exist_ok=True)


def publish(workdir: str, name: str) -> str:
    """Uploads the run in `workdir` as the model `name`, and returns its address.

    The upload is one commit: it is there whole or not at all. Raises OSError, one line, if the hub
    refuses it.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_diffusers(load(workdir), folder)
        write_card(workdir, name, folder)
        with refused(name):
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="A run")
    return f"{api.endpoint}/{name}"


def write_card(workdir: str, name: str, folder: Path) -> None:
    """Writes README.md into `folder`, and the run's newest grid of samples if there is one."""
    run = epath.Path(workdir)
    stored = flatten(json.loads((run / "config.json").read_text()))
    kind, measured = stored["objective.kind"], last_step(run)
    task, what, data = KINDS[kind]
    grids = sorted((run / "samples").glob("*.png")) if (run / "samples").exists() else []
    if grids:
        with (folder / "samples.png").open("wb") as file, grids[-1].open("rb") as grid:
            shutil.copyfileobj(grid, file)
    card = CARD.format(
        task=task,
        tags=", ".join(["instruct-pix2pix", "jax"] if kind == "edit" else ["jax"]),
        name=name.split("/")[-1],
        what=what,
        steps=measured.get("step", stored["steps"]),
        rows=stored["data.batch_size"],
        data=data,
        usage=USAGE[kind].format(name=name),
        picture="![input, result, truth](samples.png)\n" if grids else "",
        settings=table(differing(stored)),
        metrics=table(measured),
    )
    (folder / "README.md").write_text(card)


def differing(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that are not the defaults; where its files lay is nobody's concern."""
    defaults = flatten(as_json(Config()))
    private = ("data.path", "data.mix", "data.contents")
    return {k: v for k, v in stored.items() if k not in private and v != defaults.get(k)}


def last_step(run: Any) -> dict[str, Any]:
    """What metrics.jsonl says of the newest step, in one line or two; empty if it says nothing."""
    path = run / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    newest = [line for line in lines if line["step"] == lines[-1]["step"]]
    return functools.reduce(operator.or_, newest, {})


def table(values: dict[str, Any]) -> str:
    """Rows of a Markdown table."""
    texts = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return "\n".join(f"| {k} | {v} |" for k, v in texts.items()) or "| none | |"
