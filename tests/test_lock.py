"""The writer's lock and forked children: a record lock ends with its owner, children or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lamina import _core
from lamina.errors import ClosedError, StoreInUseError

PARENT_AND_CHILD = """
import os, sys, time
from lamina import _core
writer = _core.Writer(sys.argv[1])
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def family(tmp_path):
    """A process that holds the lock of `tmp_path`, and the child that it forked."""
    command = [sys.executable, "-c", PARENT_AND_CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        yield parent, child
        parent.kill()
        os.kill(child, signal.SIGKILL)


def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(family, tmp_path):
    parent, child = family
    with pytest.raises(StoreInUseError, match=f"in use by process {parent.pid} on host"):
        _core.Writer(str(tmp_path))
    parent.kill()
    parent.wait()
    os.kill(child, 0)  # still there, and the descriptor of LOCK with it
    _core.Writer(str(tmp_path)).close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_can_neither_write_through_its_parents_writer_nor_drop_its_lock(tmp_path):
    writer = _core.Writer(str(tmp_path))
    child = os.fork()
    if child == 0:
        try:
            writer.begin(
                [("model.a.output", "float32", (1,))], identity="{}", about="{}", rows_total=None
            )
        except ClosedError as error:
            os._exit(0 if f"process {os.getppid()}, which forked this one" in str(error) else 2)
        except BaseException:  # the child tells by its status alone
            os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    program = "import sys; from lamina import _core; _core.Writer(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()} on host" in found.stderr
    writer.close()
