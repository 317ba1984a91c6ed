# SPDX-License-Identifier: Apache-2.0
"""What each host of a slice runs: the training, and the keeping of its output.

python launch/worker.py --workdir gs://BUCKET/RUN [--data gs://BUCKET/SHARDS] -- --config=FILE ...
  what comes after -- goes to ip2p_jax.train, with --distributed, --workdir and, where --data is
  given, with the --config.data.path of its copy on this host

WORKDIR/logs/HOST-TIME.log is the output of this start, copied every minute and at the end. When the
last step of a run is saved, WORKDIR/state says "finished". Exit code: that of the training, but 75
where it is 0 and the run is not finished (SIGTERM, to this host or another one): start it again.

~/ip2p, or IP2P_HOME, holds train.log, data/ and, when it is over, exit. SIGTERM goes on to the
training. IP2P_KEEP: seconds between two copies of the log (60).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from ip2p_jax.cli import Parser

AGAIN = 75  # EX_TEMPFAIL
PATIENCE = 60.0  # seconds that a copy of the log may take


def files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder."""
    for item in folder.iterdir():
        if item.is_dir():
            yield from files(item)
        else:
            yield item


def fetch(source: epath.Path, target: Path) -> None:
    """Copies a data folder, as far as it is not there yet."""

    def copy(item: epath.Path) -> None:
        local = target / item.relative_to(source)
        if not (local.exists() and local.stat().st_size == item.stat().length):
            local.parent.mkdir(parents=True, exist_ok=True)
            item.copy(local, overwrite=True)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, files(source)))  # raises what a copy raised


def keep(log: Path, target: epath.Path) -> None:
    """Copies the log to the run's folder. A copy that fails or hangs leaves the training alone: the
    next one is of the whole log again."""

    def copy() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(log.read_bytes())

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    thread.join(PATIENCE)


def follow(child: subprocess.Popen, log: Path, target: epath.Path) -> int:
    """Passes the child's log on, to stdout and to the run's folder; returns its exit code."""
    every, shown, kept = float(os.environ.get("IP2P_KEEP", "60")), 0, time.monotonic()
    code = None
    while code is None:
        try:
            code = child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            pass
        with log.open("rb") as file:
            file.seek(shown)
            shown += sys.stdout.buffer.write(file.read())
            sys.stdout.flush()
        if code is not None or time.monotonic() - kept > every:
            keep(log, target)
            kept = time.monotonic()
    return code if code >= 0 else 128 - code


def is_finished(workdir: epath.Path) -> bool:
    """Whether the last step is saved, of a training that has ended well."""
    steps = json.loads((workdir / "config.json").read_text())["steps"]
    return (workdir / "checkpoints" / str(steps)).exists()


def train(workdir: epath.Path, options: list[str], home: Path) -> int:
    """Runs the training; returns the exit code that becomes this process's."""
    command = [sys.executable, "-u", "-m", "ip2p_jax.train", "--distributed", *options]
    log = home / "train.log"
    with log.open("wb") as output:  # file descriptors go on too: the lock of launch/tpu.sh is one
        child = subprocess.Popen(command, stdout=output, stderr=output, close_fds=False)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    start = time.strftime("%Y%m%d-%H%M%S")
    code = follow(child, log, workdir / "logs" / f"{socket.gethostname()}-{start}.log")
    if code:
        return code
    if not is_finished(workdir):
        return AGAIN
    (workdir / "state").write_text("finished\n")
    return 0


def run(argv: list[str], home: Path) -> int:
    """Fetches the data, trains. Raises ValueError for wrong input."""
    p = Parser(description=__doc__)
    p.add_argument("--workdir", required=True)
    p.add_argument("--data")
    p.add_argument("options", nargs="*")
    args = p.parse_args(argv)
    options = [*args.options, f"--workdir={args.workdir}"]
    if args.data:
        if not (epath.Path(args.data) / "manifest.json").exists():
            raise ValueError(f"--data {args.data}: no manifest.json, not a data folder")
        fetch(epath.Path(args.data), home / "data")
        options.append(f"--config.data.path={home / 'data'}")
    return train(epath.Path(args.workdir), options, home)


def main() -> int:
    home = Path(os.environ.get("IP2P_HOME", "~/ip2p")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    code = 1
    try:
        code = run(sys.argv[1:], home)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    finally:
        (home / "exit").write_text(f"exit {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
