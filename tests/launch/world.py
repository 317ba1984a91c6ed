# SPDX-License-Identifier: Apache-2.0
"""A checkout with launch/ in it, a gcloud that is played, and what was called."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
OURS = ("tpu.sh", "worker.py", "gke/jobset.yaml")
PLACE = {"NAME": "edits", "ZONE": "us-central2-b", "TYPE": "v4-32", "BUCKET": "gs://bucket/runs"}
INSTALL = f"""mkdir -p ~/ip2p/venv/bin
printf '#!/bin/sh\\nexec "{sys.executable}" "$@"\\n' > ~/ip2p/venv/bin/python
chmod +x ~/ip2p/venv/bin/python
"""


@functools.cache
def checkout() -> Path:
    """A repository of launch/ and of what it needs; training and its installation are played."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    texts = {name: (ROOT / "launch" / name).read_text() for name in OURS}
    texts |= {"install.sh": INSTALL, "../configs/tpu_v4.py": "", "../ip2p_jax/__init__.py": ""}
    texts["../ip2p_jax/train.py"] = (HERE / "stub_train.py").read_text()
    for name, text in texts.items():
        file = folder / "launch" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "launch/tpu.sh").chmod(0o755)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "a"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


class World:
    """Where `launch/tpu.sh` runs. `lives` are those of the slice, see tests/launch/gcloud; `host`
    says whether there is a host that runs what it is told."""

    def __init__(self, folder: Path, *lives: list[str], host: bool = False):
        self.fake, self.tools, self.checkout = folder / "fake", folder / "bin", checkout()
        (self.fake / "lives").mkdir(parents=True)
        (self.fake / "gs" / "bucket" / "runs" / "edits").mkdir(parents=True)
        if host:
            (self.fake / "host").mkdir()
        for number, life in enumerate(lives, 1):
            (self.fake / "lives" / str(number)).write_text("\n".join(life) + "\n")
        for name in ("life", "count", "looks"):
            (self.fake / name).write_text("0\n")
        self.tools.mkdir()
        (self.tools / "gcloud").symlink_to(HERE / "gcloud")
        self.environment = {f"IP2P_{k}": v for k, v in PLACE.items()}
        self.environment |= {"IP2P_POLL": "0", "IP2P_BACKOFF": "0", "IP2P_KEEP": "0"}

    def tpu(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs launch/tpu.sh."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("IP2P_", "STUB_", "GIT_"))}
        mine |= {"PATH": f"{self.tools}:{mine['PATH']}", "FAKE": str(self.fake)}
        mine |= self.environment | environment
        command = [str(self.checkout / "launch" / "tpu.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=mine, timeout=60)
        self.check_calls()
        return done

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call of gcloud."""
        file = self.fake / "calls"
        records = file.read_text().split("\x1e")[:-1] if file.exists() else []
        return [record.split("\x1f")[:-1] for record in records]

    @property
    def deeds(self) -> list[str]:
        """What was done, in order, without what was only asked."""
        names = {
            "queued-resources create": "create",
            "queued-resources delete": "delete",
            "launch/install.sh": "install",
            "launch/worker.py": "run",
            "code.tar.gz gs://": "send",
        }
        lines = [" ".join(call) for call in self.calls]
        return [deed for line in lines for part, deed in names.items() if part in line]

    def check_calls(self) -> None:
        """Only commands and flags that Google documents are used, with their zone, and none that
        waits for an answer; nothing is ever deleted but the slice."""
        for call in self.calls:
            command = " ".join(word for word in call[:4] if word.isidentifier() or "-" in word[1:])
            known = next(flags for name, flags in FLAGS.items() if command.startswith(name))
            flags = {word.split("=")[0] for word in call if word.startswith("--")}
            assert flags <= known | {"--quiet", "--project"}, call
            assert "--quiet" in flags  # never waits for an answer
            assert "--zone" in flags or call[0] == "storage"


FLAGS = {
    "compute tpus queued-resources create": {
        *("--zone", "--runtime-version", "--accelerator-type", "--node-id", "--spot", "--network"),
        *("--internal-ips", "--reserved", "--service-account"),
    },
    "compute tpus queued-resources delete": {"--zone", "--async", "--force"},
    "compute tpus queued-resources describe": {"--zone", "--format"},
    "compute tpus tpu-vm describe": {"--zone", "--format"},
    "compute tpus tpu-vm ssh": {"--zone", "--worker", "--command", "--internal-ip"},
    "storage cp": set(),
    "storage cat": set(),
    "storage ls": set(),
}
"""The flags of gcloud's commands that may be used, from the reference of Google Cloud SDK 528."""
