"""Two machines, as far as torchrun knows: two of its agents on loopback, with a rank each."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.meta_files import save_meta, save_tokenizer
from support.processes import free_port
from support.ranks import ROOT, SUPPORT
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams

TIMEOUT = 4.0  # seconds in which a rank has to be heard


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nodes")
    args = tiny_args(vocab_size=400)
    save_meta(path, args, tiny_weights(args))
    save_tokenizer(path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def alone(checkpoint) -> str:
    """What one process says."""
    llm = Llama.build(checkpoint, max_seq_len=64, device="cpu", dtype="fp32")
    [completion] = llm.complete([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    return f"tokens {completion.tokens}\n"


class Nodes:
    """The agents of two machines, each with its rank in a session of its own."""

    def __init__(self, checkpoint: Path, pids: Path, num_stages: int):
        port = free_port()
        self.pids = pids
        self.agents = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
                    *("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)),
                    *(SUPPORT / "node_rank.py", checkpoint, pids, str(num_stages)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(pids / f"errors{node}").open("wb"),
                text=True,
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "LLAMA_HEARTBEAT_TIMEOUT": str(TIMEOUT),
                },
            )
            for node in range(2)
        ]

    def answer(self) -> str:
        """The next one of rank 0."""
        return next(line for line in self.agents[0].stdout if line.startswith("tokens"))

    def rank_of(self, node: int) -> int:
        return int((self.pids / str(node)).read_text())

    def send(self, node: int, number: signal.Signals) -> None:
        """To all processes of a machine at once."""
        for pid in (self.agents[node].pid, self.rank_of(node)):
            os.kill(pid, number)

    def wait_for_end(self, node: int, seconds: float) -> str:
        """Until the machine's rank has ended. Returns what its machine wrote on standard error."""
        end, stat = time.monotonic() + seconds, Path(f"/proc/{self.rank_of(node)}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.05)
        return (self.pids / f"errors{node}").read_text()

    def end(self) -> None:
        for node, agent in enumerate(self.agents):
            pids = [agent.pid]
            if (self.pids / str(node)).exists():
                pids.append(self.rank_of(node))
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            agent.communicate()


@contextmanager
def nodes(checkpoint: Path, pids: Path, num_stages: int = 1) -> Iterator[Nodes]:
    started = Nodes(checkpoint, pids, num_stages)
    try:
        yield started
    finally:
        started.end()


SIGNALS = [(1, signal.SIGSTOP)] + [
    pytest.param(*one, marks=pytest.mark.slow)
    for one in ((0, signal.SIGSTOP), (0, signal.SIGKILL), (1, signal.SIGKILL))
]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("victim", "number"), SIGNALS)
def test_two_machines_answer_as_one_idle_in_peace_and_end_where_one_vanishes(
    checkpoint, alone, tmp_path, victim, number
):
    with nodes(checkpoint, tmp_path, num_stages=1 + victim) as both:
        assert both.answer() == alone
        time.sleep(2 * TIMEOUT)  # nothing happens for longer than a rank may be silent
        both.agents[0].stdin.write("\n")
        both.agents[0].stdin.flush()
        assert both.answer() == alone
        both.send(victim, number)
        told = both.wait_for_end(1 - victim, 30)
        if number == signal.SIGSTOP or victim == 1:  # rank 0 waits for a person, not for the others
            assert f"llama: nothing was heard of rank {victim} on " in told
        else:
            assert "Error" in told  # the connection that rank 1 waits at is closed


@pytest.mark.slow
def test_machines_end_together_when_all_is_done(checkpoint, alone, tmp_path):
    with nodes(checkpoint, tmp_path) as both:
        assert both.answer() == alone
        both.agents[0].stdin.close()
        both.agents[0].stdin = None
        assert both.agents[0].wait(60) == 0
