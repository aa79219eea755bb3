import json
from pathlib import Path

import pytest
import torch
from support import pipeline_ranks
from support.adapter_files import save_adapter
from support.meta_files import save_meta, save_tokenizer
from support.ranks import forked
from support.tiny import tiny_args, tiny_weights

from llama.model import Transformer
from llama.parallel import ModelParallel, Stage, start

SHAPE = {"n_layers": 3, "vocab_size": 401}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("vocabulary") / "tokenizer.model")


def save(path: Path, tokenizer: Path, **changes) -> Path:
    args = tiny_args(**SHAPE, **changes)
    save_meta(path, args, tiny_weights(args))
    (path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return path


def assert_equals_one_process(path: Path, num_ranks: int, num_stages: int, **options) -> None:
    args = json.loads((path / "params.json").read_text())
    expected = path / "expected.json"
    expected.write_text(json.dumps(pipeline_ranks.answers(pipeline_ranks.build(path, args, **options))))
    done = forked(num_ranks, "pipeline_ranks.py", path, expected, num_stages, json.dumps(options))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "as expected" in done.stdout


def test_two_stages_of_two_ranks_answer_as_one_process(tmp_path, tokenizer):
    path = save(tmp_path / "model", tokenizer)
    save_adapter(path / "adapter", 1, n_layers=3)
    assert_equals_one_process(path, 4, 2)


def test_three_stages_answer_as_one_process(tmp_path, tokenizer):
    assert_equals_one_process(save(tmp_path / "model", tokenizer), 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (2, {"quantization": "sym_int4", "draft": "lookup"}),  # sums over ranks would round otherwise than one's
        (2, {"kv_dtype": "int8"}),
        *((num_ranks, {"deterministic": True}) for num_ranks in (2, 4)),
        *((num_ranks, {"draft": "MODEL"}) for num_ranks in (2, 4)),
    ],
)
def test_stages_take_what_a_model_is_built_with(tmp_path, tokenizer, num_ranks, options):
    path = save(tmp_path / "model", tokenizer, dim=256, multiple_of=128)
    options = {name: str(path) if value == "MODEL" else value for name, value in options.items()}
    assert_equals_one_process(path, num_ranks, 2, **options)


def test_layers_are_cut_as_evenly_as_can_be_and_the_last_stage_has_fewer():
    for n_layers in range(1, 20):
        for count in range(1, n_layers + 1):
            parts = [Stage(number, count).layers(n_layers) for number in range(count)]
            assert [layer for part in parts for layer in part] == list(range(n_layers))
            assert sorted(map(len, parts), reverse=True) == list(map(len, parts))
            assert len(parts[0]) - len(parts[-1]) <= 1


def test_ranks_stand_in_a_ring_of_stages():
    ranks = [ModelParallel(rank, 6, root=6, num_stages=3) for rank in range(6)]
    assert [(one.stage.number, one.tensor.rank, one.tensor.size) for one in ranks] == [
        *((0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 2))
    ]
    assert [(one.stage.before, one.stage.after) for one in ranks] == [
        *((10, 8), (11, 9), (6, 10), (7, 11), (8, 6), (9, 7))
    ]


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_stage_has_the_weights_that_it_needs_and_no_others(is_tied):
    args = tiny_args(**SHAPE, tie_word_embeddings=is_tied)
    with torch.device("meta"):
        stages = [Transformer(args, ModelParallel(rank, 3, num_stages=3)) for rank in range(3)]
    names = [{name for name, _ in stage.named_parameters() if not name.startswith("layers")} for stage in stages]
    last = "tok_embeddings.weight" if is_tied else "output.weight"
    assert names == [{"tok_embeddings.weight", "norm.weight"}, {"norm.weight"}, {"norm.weight", last}]
    assert [list(stage.held_layers) for stage in stages] == [[0], [1], [2]]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="pipeline_parallel_size is 4, but the model has 3 layers"):
        Transformer(tiny_args(**SHAPE), ModelParallel(0, 4, num_stages=4))


@pytest.mark.parametrize(
    ("size", "num_stages", "message"),
    [
        (None, 3, r"pipeline_parallel_size is 3, but 4 process.*torchrun --nproc_per_node 3"),
        (None, -2, r"pipeline_parallel_size is -2, but 4 process"),
        (4, 2, r"model_parallel_size is 4 in each of 2 stages, but 4 process.*torchrun --nproc_per_node 8"),
    ],
)
def test_stages_that_do_not_divide_the_ranks_are_refused(monkeypatch, size, num_stages, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message):
        start(size, pipeline_parallel_size=num_stages)
