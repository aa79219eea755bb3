"""Ten minutes of `benchmarks/marathon.py`: nothing is lost, on one process and on two ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

MARATHON = Path(__file__).parents[2] / "benchmarks" / "marathon.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_lost_in_ten_minutes(ranks):
    command = [sys.executable, MARATHON, "--minutes", "10", "--ranks", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
