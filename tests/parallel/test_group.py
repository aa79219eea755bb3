import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.meta_files import save_meta, save_tokenizer
from support.ranks import forked, torchrun
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams
from llama.model import validate_ranks
from llama.parallel import SINGLE, start


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    save_tokenizer(directory / "tokenizer.model")
    args = tiny_args(vocab_size=400)
    for shards, embedding_dim in ((1, 0), (8, 1)):
        save_meta(directory / f"{shards}-shards", args, tiny_weights(args), shards, embedding_dim)
    return directory


@pytest.fixture(scope="module")
def single(checkpoint) -> dict:
    """One rank's answers to what tests/support/parallel_ranks.py asks."""
    llm = Llama.build(checkpoint / "1-shards", max_seq_len=64, device="cpu", dtype="fp32")
    prompts = [[1, 5, 9, 11], [1, 7], [1, *range(20, 50)]]
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    seeded = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, seed=4)
    completions = llm.complete(prompts, greedy)
    many = [
        SamplingParams(temperature=i % 2, max_tokens=1 + i % 7, ignore_eos=True, seed=i, n=1 + (i % 5 == 0))
        for i in range(24)
    ]
    others = llm.complete(prompts, seeded) + llm.complete([[1, *range(i, 3 * i + 2)] for i in range(24)], many)
    others += llm.complete(prompts, replace(seeded, regex="([a-z]{2,3} ){1,3}[!?]", n=2))
    return {
        "tokens": [completion.tokens for completion in completions + others],
        "logprobs": [entry.logprob for completion in completions for entry in completion.logprobs],
        "prompt_logprobs": [e.logprob for c in completions for e in c.prompt_logprobs[1:]],
    }


@pytest.mark.parametrize(("ranks", "shards", "launch"), [(2, 8, torchrun), (4, 1, forked)])
def test_ranks_together_answer_as_one_and_all_get_the_answer(checkpoint, single, ranks, shards, launch, tmp_path):
    model, tokenizer = checkpoint / f"{shards}-shards", checkpoint / "tokenizer.model"
    done = launch(ranks, "parallel_ranks.py", model, tokenizer, tmp_path)
    assert done.returncode == 0, done.stderr
    answers = {int(file.stem): json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert sorted(answers) == list(range(ranks))
    assert all(answer == answers[0] for answer in answers.values())
    assert answers[0]["tokens"] == single["tokens"]
    assert answers[0]["logprobs"] == pytest.approx(single["logprobs"], abs=1e-4)
    assert answers[0]["prompt_logprobs"] == pytest.approx(single["prompt_logprobs"], abs=1e-4)
    assert "max_seq_len is 64" in answers[0]["refusal"]
    assert done.stdout.count("Loaded in") == 2  # two builds, told by rank 0 alone


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_of_them_with_an_error(checkpoint, victim):
    done = forked(2, "dying_rank.py", checkpoint / "1-shards", checkpoint / "tokenizer.model", victim)
    assert done.returncode != 0
    assert "all ranks answered" not in done.stdout


def test_one_process_starts_no_process_group():
    assert start() is SINGLE
    assert not torch.distributed.is_initialized()


def test_more_ranks_than_processes_are_refused_with_the_command_that_would_do():
    with pytest.raises(ValueError, match=r"model_parallel_size is 2, but 1 process.*torchrun --nproc_per_node 2"):
        start(2)


def test_ranks_that_cannot_share_the_heads_are_told_which_numbers_can():
    with pytest.raises(ValueError, match=r"3 ranks cannot share 8 heads.*runs on 1, 2, 4 rank"):
        validate_ranks(tiny_args(), 3)


def test_collectives_are_the_identity_on_one_rank():
    x = torch.randn(3)
    assert SINGLE.tensor.all_reduce(x) is x
    assert SINGLE.tensor.all_gather(x) is x
    assert SINGLE.broadcast_json({"a": [1]}) == {"a": [1]}
    assert SINGLE.gather_json({"a": [1]}) == [{"a": [1]}]
