# SPDX-License-Identifier: Apache-2.0
"""Claims: whoever makes no progress ends, with the stacks of all threads; whoever does goes on."""

import subprocess
import sys
import time

HANG = """
import threading, time
from ip2p_jax.training.watchdog import Watchdog
{change}
def stalled_reader():
    threading.Event().wait()
threading.Thread(target=stalled_reader, daemon=True).start()
dog = Watchdog({seconds})
for _ in range(6):
    time.sleep(0.25)
    dog.beat()
with dog.patient():
    time.sleep(1.5)
dog.beat()
print("stalls", flush=True)
{stall}
dog.close()
"""


def run(seconds: int, stall: str, change: str = "") -> tuple[int, str, float]:
    """Exit code, what was said on stderr, and how long it took."""
    program = HANG.format(seconds=seconds, stall=stall, change=change)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "stalls\n", done.stderr
    return done.returncode, done.stderr, time.monotonic() - start


def test_a_stall_ends_with_the_stacks_of_all_threads():
    """Even of the regular expression below, which holds the interpreter's lock for ever."""
    for stall in ("time.sleep(60)", "import re; re.match(r'(a+)+b', 'a' * 60)"):
        code, err, seconds = run(1, stall)
        assert code == 1 and err.startswith("Timeout (0:00:01)!") and seconds < 30
        assert "stalled_reader" in err and 'File "<string>", line' in err


def test_progress_and_patience():
    """No step takes longer than a second here, what is patient takes longer; or there is none."""
    assert run(1, "time.sleep(0.1)")[:2] == (0, "")
    assert run(0, "time.sleep(1.5)")[:2] == (0, "")


def test_control_patience_ends_too():
    short = "import ip2p_jax.training.watchdog as w; w.PATIENCE = 1; time.sleep(1)"
    program = HANG.format(seconds=1, stall="", change=short)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Timeout (0:00:01)!")
