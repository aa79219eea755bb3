"""`llama bench` on a tiny model of random weights: what is measured, beside whom, and what is refused."""

import json
import re
import subprocess
import sys

import pytest
import torch

from llama import Tokenizer, Transformer
from llama.bench import contest, machine, run, sides
from llama.bench.contest import Contest, Figure, Start
from llama.bench.machine import Limits
from llama.bench.peer import Peer
from llama.bench.plot import plot_figures
from llama.bench.run import Bench, run_bench
from llama.bench.shapes import MODEL_SHAPES, write_model
from llama.bench.sides import OURS, SIDES, Contender, Material, contenders
from llama.bench.timing import alternate
from llama.bench.works import WORKS, Effort, Work
from llama.checkpoint import open_checkpoint

WORKS_OF_TESTS = {"prompt-8": Work(1, 8, 1), "context-4": Work(1, 4, 3), "batch-2": Work(2, 4, 3)}
LIMITS = Limits("a processor", ["scalar"], "cpu", 1, 8.0, "2.13.0", "float32", 20.0, 10.0, 0.2, 0.1)


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    write_model(path, MODEL_SHAPES["tiny"])
    return path


@pytest.fixture
def quick(monkeypatch):
    """Works of a few tokens, and a machine that is not measured."""
    for module in (contest, run):
        monkeypatch.setattr(module, "WORKS", WORKS_OF_TESTS)
    monkeypatch.setattr(contest, "NUM_STARTS", 1)
    monkeypatch.setattr(contest, "read_bandwidth", lambda repetitions, device: 20e9)
    monkeypatch.setattr(contest, "matrix_rate", lambda dtype, repetitions, device: 0.2e12)
    monkeypatch.setattr(run, "measure_limits", lambda device, threads: LIMITS)


def test_a_made_up_model_opens_with_a_vocabulary_of_its_own_size(tiny_shape):
    args = open_checkpoint(tiny_shape).args
    assert (args.dim, args.vocab_size, args.max_seq_len) == (256, 1024, 8192)
    tokenizer = Tokenizer(tiny_shape / "tokenizer.model")
    assert tokenizer.n_words == 1024
    assert tokenizer.decode(tokenizer.encode("abc 你好", bos=False, eos=False)) == "abc 你好"


def test_sides_take_turns_after_one_round_that_warms_up():
    order = []
    found = alternate(2, a=lambda: order.append("a") or 1.0, b=lambda: order.append("b") or 2.0)
    assert order == ["a", "b"] * 3
    assert found == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_all_who_read_plain_weights_are_measured_and_give_the_same_tokens(tiny_shape, tmp_path):
    material = Material(tiny_shape, tmp_path, "float32", 1)
    prompts, answers = [[5, 6, 7, 8], [300, 301, 302, 303]], {}
    for name in (OURS, "transformers", "padded"):
        one = Contender(name)
        peer = one.side.start(one.python)
        peer.ask(do="load", **material.load_request(one, "none"), threads=1, max_seq_len=16, max_batch_size=2)
        answer = peer.ask(do="run", prompts=prompts, num_tokens=4)
        assert len(answer["step_seconds"]) == 3
        answers[name] = answer["tokens"]
        peer.close()
    assert answers["transformers"] == answers[OURS] == answers["padded"]


def test_our_side_says_what_its_steps_read_and_multiply(tiny_shape, tmp_path):
    one = Contender(OURS)
    peer = one.side.start(one.python)
    facts = peer.ask(do="load", **Material(tiny_shape, tmp_path, "float32", 1).load_request(one, "none"), threads=1)
    peer.close()
    with torch.device("meta"):
        model = Transformer(MODEL_SHAPES["tiny"])
    matrices = [weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2]
    products = sum(matrices) - model.tok_embeddings.weight.numel()
    assert facts["inner_products"] + facts["output_products"] == products
    size = getattr(torch, facts["dtype"]).itemsize  # two bytes where the processor computes in bfloat16
    assert facts["weight_bytes"] == size * products
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * size  # keys and values, layers, heads, their size


def test_an_embedding_that_is_the_output_layer_is_read_and_multiplied_as_one(tmp_path):
    write_model(tmp_path / "model", MODEL_SHAPES["tiny"])
    [file] = (tmp_path / "model").glob("*.pth")
    weights = torch.load(file)
    output = weights.pop("output.weight")
    torch.save(weights, file)
    one = Contender(OURS)
    peer = one.side.start(one.python)
    facts = peer.ask(do="load", path=str(tmp_path / "model"), precision="none", threads=1)
    peer.close()
    assert facts["output_products"] == output.numel()
    size = getattr(torch, facts["dtype"]).itemsize
    assert facts["weight_bytes"] == size * (facts["inner_products"] + facts["output_products"])


def test_a_figure_and_a_start_come_for_every_side_that_takes_part(tiny_shape, quick):
    found = list(run_bench(Bench(tiny_shape, precisions=["none", "sym_int4"], vs="padded", rounds=1)))
    figures = [one for one in found if isinstance(one, Figure)]
    assert [(one.precision, one.work, one.side) for one in figures] == [
        *(("none", work, side) for work in WORKS_OF_TESTS for side in (OURS, "padded")),
        *(("sym_int4", work, OURS) for work in WORKS_OF_TESTS),
    ]
    ours, padded = figures[:2]
    assert ours.tokens_per_s == pytest.approx(8 / ours.seconds)
    assert padded.ratio == pytest.approx(padded.seconds / ours.seconds)
    assert all(0 < one.share_of_limit < 1 for one in figures)
    starts = [one for one in found if isinstance(one, Start)]
    assert [(one.precision, one.side) for one in starts] == [("none", OURS), ("none", "padded"), ("sym_int4", OURS)]
    assert all(one.first_token_seconds > one.import_seconds + one.load_seconds for one in starts)
    assert all(one.peak_bytes > 50 << 20 for one in starts)


def test_the_command_prints_writes_and_draws_what_it_measured(tmp_path, llama, quick):
    written, drawn = tmp_path / "speed.json", tmp_path / "speed.svg"
    status, out, err = llama(
        "bench", "--shape", "tiny", "--vs", "transformers", "--rounds", 1, "--json", written, "--plot", drawn
    )
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("transformers has no low bits: it takes no part in sym_int4")
    for part in ("processor", "sym_int4  context-4", "to the first token"):
        assert part in out
    content = json.loads(written.read_text())
    assert content["model"] == "tiny"
    assert len(content["figures"]) == len(WORKS_OF_TESTS)
    assert "<svg" in drawn.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "70b"], "--shape is '70b': there are smollm2-135m, 1.1b"),
        (["--precision", "int3"], "--precision is 'int3': there are stored, none, sym_int4"),
        (["--works", "prompt-8,batch-64"], "--works is 'batch-64': there are prompt-8"),
        (["--vs", "vllm"], "--vs names 'vllm': there are"),
        (["--vs", "padded=/no/python", "--precision", "none", "--shape", "tiny"], "/no/python does not run"),
        (["--plot", "speed.pdf"], "speed.pdf: a plot is a .png or .svg file"),
        (["--json", "no/such/speed.json"], "there is no folder no/such"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(llama, quick, arguments, message):
    status, _, err = llama("bench", *arguments)
    assert status == 1
    assert err.count("\n") == 1
    assert message in err


def test_a_model_and_a_shape_together_are_a_wrong_call(llama):
    status, _, err = llama("bench", "model", "--shape", "tiny")
    assert (status, err) == (2, "llama: give a MODEL or --shape, not both\n")


def test_what_a_script_cannot_do_is_its_own_words_in_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('there is no llama_cpp')")
    with pytest.raises(RuntimeError, match=r"script.py ended with status 1: there is no llama_cpp$"):
        Peer(sys.executable, script).ask(do="load")
    peer = SIDES["padded"].start(sys.executable)
    with pytest.raises(RuntimeError, match="no/such/place"):
        peer.ask(do="load", path="/no/such/place", threads=1, dtype="float32")
    peer.close()


def test_a_sides_memory_is_its_own_and_not_that_of_whoever_started_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.append({str(sides.CHILDREN)!r}); import lines; lines.answer_lines()")
    held = bytearray(b"x" * (300 << 20))
    peer = Peer(sys.executable, script)
    found = peer.ask(do="memory")["bytes"]
    peer.close()
    assert 1 << 20 < found < len(held) // 2


@pytest.mark.parametrize("of_a_person", [None, "5000"])
def test_a_peers_threads_do_not_wait_as_ours_are_told_to(of_a_person, tmp_path, monkeypatch):
    """What this package sets is not passed on; what a person has set is."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if of_a_person:
        monkeypatch.setenv("GOMP_SPINCOUNT", of_a_person)
    code = "import os, llama; print(os.environ['GOMP_SPINCOUNT'])"
    ours = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("GOMP_SPINCOUNT", ours)
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.append({str(sides.CHILDREN)!r}); import lines\n"
        "lines.answer_lines(run=lambda: {'spins': os.environ.get('GOMP_SPINCOUNT')})\n"
    )
    peer = Peer(sys.executable, script)
    assert peer.ask(do="run") == {"spins": of_a_person}
    peer.close()


def test_what_a_peers_library_prints_is_not_taken_for_an_answer(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.append({str(sides.CHILDREN)!r}); import lines\n"
        "def run():\n    os.write(1, b'[loaded\\n')\n    print('half')\n    return {'done': True}\n"
        "lines.answer_lines(run=run)\n"
    )
    peer = Peer(sys.executable, script)
    assert peer.ask(do="run") == {"done": True}
    peer.close()


def test_the_fastest_of_a_peers_settings_is_measured(monkeypatch):
    side = sides.Side("script.py", "gguf", "a package", settings=({"flash": True}, {"flash": False}))
    monkeypatch.setitem(SIDES, "llamacpp", side)
    running = contest.Running(Contender("llamacpp"), peer=None, facts={})
    monkeypatch.setattr(running, "seconds", lambda work, setting: 2.0 if setting["flash"] else 1.0)
    assert running.best_setting(WORKS["batch-8"]) == {"flash": False}


def test_a_work_that_is_longer_than_the_models_context_is_left_out(tiny_shape, tmp_path):
    args = open_checkpoint(tiny_shape).args
    found = Contest(Material(tiny_shape, tmp_path, "float32", 1), contenders(None), ["none"], ["prompt-512"], LIMITS)
    found.context = 512
    assert list(found.left_out()) == ["prompt-512: the model was made for 512 tokens"]
    assert args.max_seq_len == 8192


def test_the_limits_count_what_a_step_reads_and_multiplies():
    effort = Effort(weight_bytes=1000, kv_bytes_per_token=10, inner_products=100, output_products=7)
    assert effort.bytes_read(Work(2, 100, 21)) == 1000 + 2 * 110 * 10
    assert effort.operations(Work(2, 100, 21)) == 2 * 2 * 107
    assert effort.operations(Work(1, 100, 1)) == 2 * (100 * 100 + 7)


def test_the_machine_is_measured_in_its_own_numbers(monkeypatch):
    monkeypatch.setattr(machine, "BUFFER", 1 << 16)
    found = machine.measure_limits("cpu", 1)
    assert (found.threads, found.device) == (1, "cpu")
    assert min(found.read_GB_per_s, found.matrix_TFLOP_per_s) > 0


def test_a_plot_has_a_line_for_every_side(tmp_path):
    def figure(side: str, work: str, rate: float) -> Figure:
        return Figure("q8_0", work, side, 1 / rate, rate, (rate, rate), "", None, "matrix rate", 0.5)

    works = ("context-0", "context-512", "batch-8")
    for sides_drawn, lines in (([OURS], 2), ([OURS, "ik"], 4)):
        path = tmp_path / f"{lines}.svg"
        plot_figures(path, "a model", [figure(side, work, 9.0) for side in sides_drawn for work in works])
        drawn = path.read_text()
        assert len(re.findall(r"stroke-width: 1\.5; stroke-linecap: square", drawn)) == 2 * lines  # one in the legend
