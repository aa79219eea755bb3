"""The pieces of `benchmarks/quality.py`, on tiny models."""

import importlib
import json
import mmap
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from support import slow
from support.checkpoints import write_gguf
from support.tiny import ByteTokenizer, tiny_args, tiny_model, tiny_weights

from llama import Llama
from llama.bench.sides import CHILDREN
from llama.checkpoint import open_checkpoint, untied
from llama.perplexity import perplexity

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
UNCOUNTED = 64 * mmap.PAGESIZE  # that Linux counts for a thread by itself, until it adds them up: proc(5), RssAnon
ARGS = tiny_args()
TEXT = "How far is a packed model from its baseline, at every position of a text new to both of them?"  # 3 x 31


@pytest.fixture(scope="module")
def quality():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("quality")


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(ARGS), ByteTokenizer(), chat_format="llama2")


@pytest.fixture(scope="module")
def logits(quality, llm):
    return partial(quality.window_logits, llm)


@pytest.fixture
def windows(quality) -> list[list[int]]:
    return quality.cut(list(TEXT.encode()), [ByteTokenizer.bos_id], 32)


def test_a_model_agrees_with_itself(quality, llm, logits, windows):
    found = quality.compare(logits, logits, windows)
    assert (found.divergence, found.agreement) == (0, 1)
    assert found.perplexity == pytest.approx(perplexity(llm, TEXT, 32, 31).perplexity, rel=1e-4)


def test_divergence_and_agreement_by_their_definitions(quality, logits, windows):
    other = Llama(tiny_model(ARGS, seed=1), ByteTokenizer(), chat_format="llama2")
    found = quality.compare(partial(quality.window_logits, other), logits, windows)
    scores = [
        torch.cat([slow.logits(tiny_weights(ARGS, seed), ARGS, part)[:-1] for part in windows]) for seed in (0, 1)
    ]
    base, ours = (s.double().log_softmax(-1) for s in scores)
    assert found.divergence == pytest.approx((base.exp() * (base - ours)).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement == (base.argmax(-1) == ours.argmax(-1)).double().mean().item()


def test_another_program_s_logits_come_through_a_file(quality, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import array\nfrom lines import answer_lines\n"
        "def load(path, threads): return {'vocab_size': 3}\n"
        "def logits(tokens, to):\n"
        "    with open(to, 'wb') as file:\n"
        "        file.write(array.array('f', [token + i / 4 for token in tokens for i in range(3)]))\n"
        "    return {'file': to}\n"
        "answer_lines(load=load, logits=logits)\n"
    )
    peer = quality.Peer(sys.executable, script, PYTHONPATH=str(CHILDREN))
    with quality.peer_logits(peer, tmp_path / "model.gguf") as logits:
        assert logits([5, 7]).tolist() == [[5, 5.25, 5.5], [7, 7.25, 7.5]]
        assert logits([1]).tolist() == [[1, 1.25, 1.5]]


def test_llama_cpp_reads_the_very_blocks_that_are_multiplied(quality, tmp_path):
    args = tiny_args(multiple_of=32, tie_word_embeddings=True)
    source = write_gguf(tmp_path / "source.gguf", args, tiny_weights(args), vocabulary=True)
    quality.write_packed(source, tmp_path / "packed.gguf", "q5_1")
    model, packed = untied(open_checkpoint(source)), open_checkpoint(tmp_path / "packed.gguf")
    stored = {weight.name: weight for weight in model.weights()}
    assert packed.args == model.args
    assert {weight.name for weight in packed.weights()} == stored.keys() >= {"output.weight", "tok_embeddings.weight"}
    for weight in packed.weights():
        plain = stored[weight.name].read()
        if quality.is_linear(weight.name):
            assert torch.equal(weight.read_packed()[0], quality.FORMATS["q5_1"].quantize(plain)), weight.name
        else:
            assert torch.equal(weight.read(), plain), weight.name


@pytest.mark.parametrize("row", ["unpacked", "sym_int4", "nf4", "int8 cache"])
def test_what_llama_cpp_has_no_type_for_is_not_asked_of_it(quality, row):
    assert quality.llamacpp_quality("no python", row, None, []) is None


def test_windows_hold_every_token_once(quality):
    assert quality.cut([1, 2, 3, 4, 5], [0], 3) == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert quality.cut([1, 2, 3], [], 2) == [[1, 2]]


def test_the_text_is_long_enough_and_ends_where_it_is_told(quality):
    assert bytes(quality.read_text(ByteTokenizer(), 25)) == b"Objects, values and types"
    with pytest.raises(ValueError, match="ask for no more"):
        quality.read_text(ByteTokenizer(), 10**7)


@pytest.mark.parametrize(
    ("format", "error"), [("sym_int4", 0.0954), ("asym_int4", 0.0899), ("sym_int5", 0.0475), ("nf4", 0.092)]
)
def test_error_on_random_weights_is_that_of_the_published_quantizers(quality, format, error):
    assert quality.packing_error(format, quality.random_weights()) == pytest.approx(error, rel=0.02)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_sees_what_is_held_and_what_was(quality):
    size = 64 << 20
    with quality.Memory() as memory:
        kept, dropped = (mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
        for pages in (kept, dropped):
            for _ in range(64):  # little at a time: what is written from is memory, too, and may be kept
                pages.write(bytes(size // 64))
        time.sleep(0.1)
        dropped.close()
    assert size - UNCOUNTED <= memory.held < 1.5 * size
    assert memory.peak >= 2 * size
    kept.close()


def test_a_row_shows_what_there_is(quality):
    figures = quality.Figures(
        4.25,
        100 << 20,
        120 << 20,
        quality.Quality(12.3456, 0.01234, 0.987),
        quality.Quality(12.4, 0.0234, 0.98),
        quality.Speed(500.4, 1.234),
        quality.Speed(40.2, 2.5),
    )
    line = quality.Line("sym_int4", figures, 80 << 20, 0.09, 0.0954)
    assert line.cells() == [
        *("sym_int4", "4.25", "80.0", "100 (120)", "12.346", "0.0123", "0.0234", "98.7%"),
        *("1.23 (500)", "2.50 (40)", "0.0900", "0.0954"),
    ]
    untimed = quality.Line("nf4", quality.Figures(4.25, 1 << 20, 1 << 20, quality.Quality(12.3456, 0.01234, 0.987)))
    assert untimed.cells() == ["nf4", "4.25", "–", "1 (1)", "12.346", "0.0123", "–", "98.7%", *["–"] * 4]
    wide = quality.Line("q6_k", random_error=0.02)
    assert wide.cells() == ["q6_k", "6.562", *["–"] * 9, "0.0200"]
    table = quality.to_markdown([line, wide]).splitlines()
    assert [row.count("|") for row in table] == [len(quality.HEADS) + 1] * 4


def test_figures_come_back_from_json(quality):
    figures = quality.Figures(4.25, 1, 2, quality.Quality(12.0, 0.1, 0.9), decode=quality.Speed(40.0, 2.5))
    assert quality.Figures.from_json(json.loads(json.dumps(asdict(figures)))) == figures


def test_the_table_stands_between_the_marks_of_the_document(quality):
    document = (BENCHMARKS.parent / "docs" / "quantization.md").read_text(encoding="utf-8")
    once = quality.between_marks(document, "| a |")
    assert once.count("| a |") == 1
    assert quality.between_marks(once, "| b |") == once.replace("| a |", "| b |")
    assert once.partition(quality.START)[0] == document.partition(quality.START)[0]
    assert once.partition(quality.END)[2] == document.partition(quality.END)[2]
    with pytest.raises(ValueError, match="no place for the table"):
        quality.between_marks("no marks", "| a |")
