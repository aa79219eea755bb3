"""The reference's contract: signatures, prompt ids, results, messages; then what goes beyond it."""

import inspect
import json
from pathlib import Path

import numpy
import pytest
import torch
from support import slow
from support.meta_files import save_meta, save_tokenizer
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams, Tokenizer
from llama.device import choose_dtype
from llama.generation import UNSAFE_ERROR

ARGS = tiny_args(vocab_size=400)
DIALOG = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "one "},
    {"role": "assistant", "content": " two"},
    {"role": "user", "content": " three "},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("generation")
    save_tokenizer(directory / "tokenizer.model")
    save_meta(directory / "model", ARGS, tiny_weights(ARGS))
    return directory / "model"


@pytest.fixture
def llm(checkpoint) -> Llama:
    return Llama.build(checkpoint, max_seq_len=128, max_batch_size=4, device="cpu", dtype="fp32")


def asked(llm: Llama, monkeypatch) -> list[list[int]]:
    """Collects the prompts that reach the engine."""
    prompts: list[list[int]] = []
    add = llm.engine.add

    def record(query):
        prompts.append(list(query.tokens))
        return add(query)

    monkeypatch.setattr(llm.engine, "add", record)
    return prompts


def test_signatures_begin_as_the_references_do():
    def positional(function) -> list[tuple]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        found = [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind == kind]
        return [item for item in found if item[0] != "self"]

    none, empty = None, inspect.Parameter.empty
    sampling = [("temperature", 0.6), ("top_p", 0.9)]
    assert [name for name, _ in positional(Llama.build)] == [
        "ckpt_dir",
        "tokenizer_path",
        "max_seq_len",
        "max_batch_size",
        "model_parallel_size",
        "seed",
    ]
    assert positional(Llama.build)[-2:] == [("model_parallel_size", none), ("seed", 1)]
    assert positional(Llama.generate) == [
        ("prompt_tokens", empty),
        ("max_gen_len", empty),
        *sampling,
        ("logprobs", False),
        ("echo", False),
    ]
    assert positional(Llama.text_completion) == [
        ("prompts", empty),
        *sampling,
        ("max_gen_len", none),
        ("logprobs", False),
        ("echo", False),
    ]
    assert positional(Llama.chat_completion) == [
        ("dialogs", empty),
        *sampling,
        ("max_gen_len", none),
        ("logprobs", False),
    ]


def test_build_tells_how_long_it_took_and_works_twice(checkpoint, capsys):
    first = Llama.build(str(checkpoint), str(checkpoint.parent / "tokenizer.model"), 64, 2)
    second = Llama.build(str(checkpoint), str(checkpoint.parent / "tokenizer.model"), 64, 2)
    assert capsys.readouterr().out.count("Loaded in ") == 2
    assert first.generate([[1, 2]], 5, 0.0) == second.generate([[1, 2]], 5, 0.0)


def test_build_changes_no_global_of_the_host_program(checkpoint):
    before = (torch.get_default_dtype(), torch.get_default_device(), torch.get_rng_state())
    Llama.build(checkpoint, max_seq_len=32)
    assert before[:2] == (torch.get_default_dtype(), torch.get_default_device())
    assert torch.equal(before[2], torch.get_rng_state())


def test_generate_continues_ragged_prompts_as_a_slow_implementation_does(llm):
    prompts = [[1, 9, 8], [1, *range(100, 140)], [1]]
    tokens, logprobs = llm.generate(prompts, 10, temperature=0.0)
    assert logprobs is None
    weights = tiny_weights(ARGS)
    for prompt, found in zip(prompts, tokens, strict=True):
        expected = slow.greedy(weights, ARGS, prompt, 10)
        if llm.tokenizer.eos_id in expected:
            expected = expected[: expected.index(llm.tokenizer.eos_id)]
        assert found == expected


def test_echo_gives_the_prompt_too_with_logprobs_shifted_rightly(llm):
    prompt = [1, 9, 8, 77]
    scores = slow.logits(tiny_weights(ARGS), ARGS, prompt).log_softmax(-1)
    expected = [0.0] + [scores[i, token].item() for i, token in enumerate(prompt[1:])]
    for max_gen_len in (0, 3):
        [tokens], [logprobs] = llm.generate([prompt], max_gen_len, 0.0, logprobs=True, echo=True)
        assert tokens[:4] == prompt
        assert logprobs[:4] == pytest.approx(expected, abs=1e-4)
        assert len(tokens) == len(logprobs) <= 4 + max_gen_len


def test_echo_is_not_cut_at_an_end_token_inside_the_prompt(llm):
    prompt = [1, 9, llm.tokenizer.eos_id, 1, 8]
    [tokens], _ = llm.generate([prompt], 2, 0.0, echo=True)
    assert tokens[:5] == prompt


def test_a_prompt_that_fills_the_context_gets_no_token(llm):
    tokens, _ = llm.generate([[1] * 128, [1] * 127], 5, 0.0)
    assert len(tokens[0]) == 0
    assert len(tokens[1]) <= 1


def test_more_prompts_than_max_batch_size_are_scheduled(llm):
    tokens, _ = llm.generate([[1, i] for i in range(9)], 3, 0.0)
    assert len(tokens) == 9


def test_no_prompts_give_no_answers(llm):
    assert llm.generate([], 5) == ([], None)
    assert llm.text_completion([]) == []


def test_text_completion_encodes_with_bos_and_returns_only_what_is_asked(llm, monkeypatch):
    prompts = asked(llm, monkeypatch)
    [plain] = llm.text_completion(["quick fox"], temperature=0.0, max_gen_len=6)
    assert prompts == [llm.tokenizer.encode("quick fox", True, False)]
    assert prompts[0][0] == llm.tokenizer.bos_id
    assert set(plain) == {"generation"}
    [detailed] = llm.text_completion(["quick fox"], 0.0, 0.9, 6, True, True)
    assert set(detailed) == {"generation", "tokens", "logprobs"}
    assert "".join(detailed["tokens"]) == detailed["generation"]
    assert len(detailed["tokens"]) == len(detailed["logprobs"])
    assert detailed["generation"].startswith("quick fox")


def test_chat_prompts_equal_the_references_to_the_token(llm, monkeypatch):
    prompts = asked(llm, monkeypatch)
    llm.chat_completion([DIALOG], temperature=0.0, max_gen_len=2)
    encode = llm.tokenizer.encode
    assert prompts == [
        encode("[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\none [/INST] two ", True, True)
        + encode("[INST] three [/INST]", True, False)
    ]


def test_chat_completion_answers_as_the_assistant(llm):
    [plain] = llm.chat_completion([DIALOG], temperature=0.0, max_gen_len=4)
    assert set(plain) == {"generation"}
    assert plain["generation"]["role"] == "assistant"
    [detailed] = llm.chat_completion([DIALOG], 0.0, 0.9, 4, True)
    assert detailed["generation"] == plain["generation"]
    assert "".join(detailed["tokens"]) == detailed["generation"]["content"]


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_a_dialog_with_special_tags_gets_the_references_refusal_and_costs_nothing(llm, monkeypatch, tag):
    prompts = asked(llm, monkeypatch)
    unsafe = [{"role": "user", "content": f"ignore {tag} this"}]
    first, second = llm.chat_completion([unsafe, DIALOG], max_gen_len=2, logprobs=True)
    assert first == {
        "generation": {
            "role": "assistant",
            "content": "Error: special tags are not allowed as part of the prompt.",
        },
        "tokens": [],
        "logprobs": [],
    }
    assert second["generation"]["content"] != UNSAFE_ERROR
    assert len(prompts) == 1


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        (
            [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
            "model only supports 'system', 'user' and 'assistant' roles, starting with 'system', then 'user' and "
            "alternating (u/a/u/a/u...)",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "Last message must be from user, got assistant",
        ),
    ],
)
def test_a_wrong_role_order_is_refused_with_the_references_words(llm, dialog, message):
    with pytest.raises(AssertionError) as caught:
        llm.chat_completion([dialog])
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="user"):
        llm.chat([dialog])


def test_a_refused_prompt_refuses_the_whole_list_and_leaves_nothing_behind(llm):
    with pytest.raises(ValueError, match="the prompt has 200 tokens, but max_seq_len is 128"):
        llm.generate([[1, 2], [1] * 200], 5)
    list(llm.stream_text([1, 2], SamplingParams(max_tokens=1)))
    assert llm.engine.stats().num_referenced_blocks == 0
    assert not llm.engine.has_work


def test_logits_that_are_not_finite_raise_and_are_never_sampled_from(llm):
    llm.model.tok_embeddings.weight[9] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        llm.generate([[1, 2], [1, 9]], 5)
    completions = llm.complete([[1, 2], [1, 9]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [c.finish_reason for c in completions] == ["length", "error"]


def test_complete_takes_texts_and_ids_one_params_or_one_each_and_keeps_the_order(llm):
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    text = "quick fox"
    ids = llm.tokenizer.encode(text, bos=True, eos=False)
    first, second = llm.complete([text, ids], greedy)
    assert first == second
    long, short = llm.complete([text, text], [greedy, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)])
    assert (long.tokens, short.tokens) == (first.tokens, first.tokens[:2])
    assert long.finish_reason == "length"


def test_several_answers_come_prompt_by_prompt(llm):
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=4, n=3, ignore_eos=True)
    together = llm.complete(["quick", "fox"], params)
    assert len(together) == 6
    assert together[:3] == llm.complete(["quick"], params)


def test_score_gives_every_token_its_logprob(llm):
    prompts = [[1, 9, 8, 77, 30], [1, 5]]
    for prompt, entries in zip(prompts, llm.score(prompts), strict=True):
        scores = slow.logits(tiny_weights(ARGS), ARGS, prompt).log_softmax(-1)
        assert entries[0] is None
        assert [entry.token for entry in entries[1:]] == prompt[1:]
        expected = [scores[i, token].item() for i, token in enumerate(prompt[1:])]
        assert [entry.logprob for entry in entries[1:]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embed_pools_the_normalised_states(llm, pooling):
    prompts = [[1, 9, 8, 77, 30], [1, 5], [1, *range(100, 160)]]
    found = llm.embed(prompts, pooling)
    weights = tiny_weights(ARGS)
    identity = weights | {"output.weight": torch.eye(ARGS.dim)}  # logits that are the states
    for prompt, row in zip(prompts, found, strict=True):
        states = slow.logits(identity, ARGS, prompt)
        expected = states.mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(row, expected / expected.norm(), rtol=0, atol=1e-5)
    assert len(llm.embed([], pooling)) == 0


def test_an_unknown_pooling_is_refused(llm):
    with pytest.raises(ValueError, match="pooling is 'max': give mean or last"):
        llm.embed([[1, 2]], "max")


def test_streamed_pieces_join_to_the_completion(llm):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30)
    [completion] = llm.complete(["quick fox"], params)
    assert "".join(llm.stream_text("quick fox", params)) == completion.text
    [answer] = llm.chat([DIALOG], params)
    assert "".join(llm.stream_chat(DIALOG, params)) == answer.text


def test_a_stop_string_across_tokens_ends_the_text_before_it_in_stream_and_list(llm):
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    [whole] = llm.complete(["quick fox"], params)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 4]
    stopping = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=stop)
    [cut] = llm.complete(["quick fox"], stopping)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert "".join(llm.stream_text("quick fox", stopping)) == cut.text


def test_a_stream_has_one_answer(llm):
    with pytest.raises(ValueError, match="n is 2"):
        list(llm.stream_text("quick", SamplingParams(n=2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.complete("quick"), "one string was given"),
        (lambda llm: llm.complete(["a", "b"], [SamplingParams()]), "1 params were given for 2 prompts"),
        (lambda llm: llm.complete(["a"], SamplingParams(stop_token_ids=(400,))), "vocabulary"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(llm, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(llm)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_larger_than_the_models_vocabulary_is_refused(checkpoint, tmp_path):
    save_tokenizer(tmp_path / "tokenizer.model", vocab_size=410)
    with pytest.raises(ValueError, match=r"the tokenizer has 4\d\d tokens, but the model's vocabulary 400"):
        Llama.build(checkpoint, tmp_path / "tokenizer.model")


def test_added_tokens_without_an_embedding_warn_and_refuse_only_the_prompts_that_hold_them(
    checkpoint, tmp_path, capsys
):
    path = save_tokenizer(tmp_path / "tokenizer.model")
    size = Tokenizer(path).n_words
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": size, "glucosamine": size + 3}))
    llm = Llama.build(checkpoint, path, dtype="fp32", kv_cache_memory=1 << 22)
    assert f"has {size + 4} tokens, but the model's vocabulary 400: prompts with the added" in capsys.readouterr().err
    params = SamplingParams(max_tokens=1)
    assert len(llm.complete(["take it"], params)) == 1
    with pytest.raises(ValueError, match=str(size + 3)):
        llm.complete(["take glucosamine"], params)


def test_a_cache_that_cannot_hold_one_sequence_is_refused_with_what_would_fit(checkpoint):
    with pytest.raises(ValueError, match="set max_seq_len to 32 or less, or give more kv_cache_memory"):
        Llama.build(checkpoint, max_seq_len=128, dtype="fp32", kv_cache_memory=20_000)


def test_the_memory_of_the_cache_may_be_given_as_text(checkpoint):
    texts, numbers = (
        Llama.build(checkpoint, max_seq_len=32, dtype="fp32", kv_cache_memory=memory).engine.stats().num_blocks
        for memory in ("1MiB", 1 << 20)
    )
    assert texts == numbers
    with pytest.raises(ValueError, match="'much' is no size; write bytes"):
        Llama.build(checkpoint, max_seq_len=32, dtype="fp32", kv_cache_memory="much")


def test_a_checkpoint_without_a_tokenizer_says_what_to_give(tmp_path):
    save_meta(tmp_path / "deep" / "model", ARGS, tiny_weights(ARGS))
    with pytest.raises(FileNotFoundError, match="give tokenizer_path"):
        Llama.build(tmp_path / "deep" / "model")


def test_dtypes_are_named_stored_or_chosen_by_the_processor():
    cpu = torch.device("cpu")
    assert choose_dtype("fp16", torch.float32, cpu) == torch.float16
    assert choose_dtype(torch.bfloat16, None, cpu) == torch.bfloat16
    assert choose_dtype("auto", torch.float32, cpu) == torch.float32
    assert choose_dtype("auto", torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("auto", None, torch.device("mps")) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'int3': give auto, bf16, fp16, fp32"):
        choose_dtype("int3", None, cpu)


def test_the_package_exports_the_references_names_and_its_own():
    import llama

    assert set(llama.__all__) >= {
        "Llama",
        "Dialog",
        "ModelArgs",
        "Transformer",
        "Tokenizer",
        "SamplingParams",
    }
    assert Tokenizer is llama.Tokenizer


def test_a_refused_dialog_keeps_its_place_and_is_known_by_a_flag(llm):
    unsafe = [{"role": "user", "content": "an [INST] tag"}]
    completions = llm.chat([DIALOG, unsafe, DIALOG], SamplingParams(temperature=0.0, max_tokens=3, n=2))
    assert [(c.place, c.index) for c in completions] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [c.refused for c in completions] == [False, False, True, True, False, False]
    assert [c.text for c in completions if c.refused] == [UNSAFE_ERROR] * 2
    assert list(llm.stream_chat(unsafe)) == [UNSAFE_ERROR]


@pytest.mark.parametrize("kind", [tuple, torch.tensor, numpy.array, lambda ids: numpy.array(ids, numpy.int32)])
def test_prompts_of_ids_may_be_arrays_and_tensors(llm, kind):
    prompt, params = [1, 9, 8, 77], SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True, seed=3)
    assert llm.complete([kind(prompt)], params) == llm.complete([prompt], params)
    assert list(llm.stream_text(kind(prompt), params)) == list(llm.stream_text(prompt, params))
    assert torch.equal(llm.embed([kind(prompt)]), llm.embed([prompt]))


def test_embeddings_are_float32_whatever_the_programs_default(llm):
    torch.set_default_dtype(torch.float64)
    try:
        assert llm.embed([[1, 2]]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_built_without_a_seed_draws_one_and_says_which(checkpoint):
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)

    def built(seed) -> Llama:
        return Llama.build(checkpoint, max_seq_len=128, device="cpu", dtype="fp32", seed=seed)

    first, second = built(None), built(None)
    assert first.seed != second.seed
    [expected] = first.complete([[1, 2]], params)
    assert built(first.seed).complete([[1, 2]], params) == [expected]
    assert built(numpy.uint32(first.seed)).complete([[1, 2]], params) == [expected]
