# SPDX-License-Identifier: Apache-2.0
"""Stands for ip2p_jax.train on a host: counts to STUB_STEPS, saves each step, resumes at the last.

SIGTERM ends it well. STUB_CODE: it fails with this exit code at step 2, or by that signal. FAKE: at
step 3 of its first start it has its slice preempted.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

options = dict(x.split("=", 1) for x in sys.argv[1:] if "=" in x)
workdir, steps = Path(options["--workdir"]), int(os.environ.get("STUB_STEPS", "5"))
saved = workdir / "checkpoints"
saved.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text(json.dumps({"log": {"every": 1}, "steps": steps}, indent=2))
(workdir / "argv.json").write_text(json.dumps(sys.argv[1:]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("SIGTERM: saved")))
begin = max([0, *(int(x.name) for x in saved.iterdir())])
print(f"going on from step {begin}")
for step in range(begin + 1, steps + 1):
    (saved / str(step)).mkdir()
    print(f"step {step}")
    code = int(os.environ.get("STUB_CODE", "0"))
    if code and step == 2:
        os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
    if "FAKE" in os.environ and begin == 0 and step == 3:
        fake = Path(os.environ["FAKE"])
        (fake / "host" / "pids").write_text(f"{os.getppid()} {os.getpid()}")
        (fake / "preempt").touch()
        time.sleep(60)
    time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
