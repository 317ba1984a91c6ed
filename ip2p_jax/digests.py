# SPDX-License-Identifier: Apache-2.0
"""Digests of checkpoints, and which checkpoint of a run is used: the newest that is whole.

DIR/checkpoints/STEP/digests.json holds the sha256 of every file of the step's items. It is written
into the temporary folder just before that gets its name, so a killed save leaves no step without.
orbax itself compares nothing: a flipped byte comes back as another number. The two files that it
writes after the digests (`_CHECKPOINT_METADATA`, `commit_success.txt`) hold nothing we read.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

FILE = "digests.json"
THREADS = 8
CHUNK = 2**22  # bytes


def directory(run: str) -> epath.Path:
    """DIR/checkpoints of a run, absolute, as orbax wants it."""
    path = epath.Path(run)
    return (path if "://" in run else epath.Path(Path(run).absolute())) / "checkpoints"


def sha256(path: epath.Path) -> str:
    """Hex digest of a file, wherever it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(functools.partial(file.read, CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def files(step: epath.Path) -> dict[str, epath.Path]:
    """All files of a checkpoint's items, by their path in it."""
    found, folders = {}, [item for item in step.iterdir() if item.is_dir()]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            else:
                found[path.relative_to(step).as_posix()] = path
    return found


def write(step: epath.Path) -> None:
    """Writes the digests of a checkpoint that is complete but for its name into it."""
    found = files(step)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = dict(zip(found, pool.map(sha256, found.values()), strict=True))
    (step / FILE).write_text(json.dumps(digests, indent=1, sort_keys=True))


def fault(step: epath.Path, items: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint, if anything; `items` are those that will be read.

    One without digests is older than they are, for a step gets its name last: it is whole when
    each of the items is there and none of their files is empty.
    """
    found = {name: path for name, path in files(step).items() if name.split("/")[0] in items}
    for item in items:
        if not any(name.startswith(f"{item}/") for name in found):
            return f"{item}/ is missing"
    try:
        wanted = json.loads((step / FILE).read_text())
    except FileNotFoundError:
        empty = sorted(name for name, path in found.items() if not path.stat().length)
        return f"{empty[0]} is empty" if empty else None
    except ValueError:
        return f"{FILE} is not JSON"
    wanted = {name: x for name, x in wanted.items() if name.split("/")[0] in items}
    if missing := sorted(wanted.keys() - found.keys()):
        return f"{missing[0]} is missing"
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(sha256, [found[name] for name in wanted])
        for name, digest in zip(wanted, digests, strict=True):
            if digest != wanted[name]:
                return f"{name} is not what was written (sha256)"
    return None


def newest(root: epath.Path, items: Sequence[str]) -> tuple[int, dict[int, str]]:
    """Returns the newest step under DIR/checkpoints that is whole, and what is wrong with newer.

    Raises FileNotFoundError where there is none at all, ValueError where none is whole.
    """
    from orbax.checkpoint.utils import checkpoint_steps  # a third of a second; only runs need it

    steps = sorted(checkpoint_steps(root), reverse=True) if root.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"{root.parent}: no checkpoint under {root}")
    faults = {}
    for step in steps:
        wrong = fault(root / str(step), items)
        if wrong is None:
            return step, faults
        faults[step] = wrong
    told = "; ".join(f"in step {step} {wrong}" for step, wrong in faults.items())
    raise ValueError(f"{root}: no checkpoint is whole: {told}")
