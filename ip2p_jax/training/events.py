# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files, written at once and by no thread of their own.

tensorboardX's writer has a thread that ends at the first failure of the disk; whoever adds to its
queue then waits for ever.
"""

import hashlib
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


def open_board(project: str, workdir: str, settings: dict[str, Any]) -> Any:
    """Begins, or goes on with, the run of this folder on Weights & Biases.

    Raises ValueError, one line, if its package is not there.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"config.log.wandb={project}: needs `pip install wandb`") from None
    remote = "://" in workdir  # then its own files go to the working directory
    place = workdir if remote else str(Path(workdir).absolute())
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    folder = None if remote else workdir
    return wandb.init(project=project, id=name, resume="allow", dir=folder, config=settings)


class Events:
    """An event file in a folder. All methods raise OSError where it cannot be written."""

    def __init__(self, folder: str, purge_step: int):
        """Hides what earlier files of the folder say of `purge_step` and later."""
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self.file = RecordWriter(f"{folder.rstrip('/')}/{name}")
        self.add(0, file_version="brain.Event:2")
        self.add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self.file.write(event.SerializeToString())

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.add(step, summary=summary.scalar(name, value))
        self.file.flush()

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        self.add(step, summary=summary.image(name, pixels, dataformats="HWC"))
        self.file.flush()

    def close(self) -> None:
        self.file.close()
