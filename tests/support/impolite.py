"""Runs a script in which no thread gets Python's lock before the one that has it waits for something.

    python -m torch.distributed.run ... tests/support/impolite.py SCRIPT ARGUMENT ...

Gloo's threads let go of a collective's tensors with that lock, some time after the collective. If the script ends
before, Python aborts the process ("terminate called without an active exception"). That is rare, and less so here:
fsdp2_tp.py, when it did not wait for them, was aborted one time in three.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.setswitchinterval(1000.0)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
