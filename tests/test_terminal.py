"""The command line as a person meets it: answers on standard output, everything else on standard error."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
from support.meta_files import save_meta, save_tokenizer
from support.terminal import Terminal
from support.tiny import tiny_args, tiny_weights

from llama import __main__ as command_line
from llama import report, terminal
from llama.chat import UNSAFE_ERROR
from llama.checkpoint import Finding
from llama.generation import Completion, Llama
from llama.sampling import SamplingParams

ROOT = Path(__file__).parent.parent
LLAMA = [sys.executable, "-m", "llama"]
READY = "\x1b[?2004h"  # the terminal is asked to mark pastes: keys are read from now on


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("terminal")
    save_tokenizer(directory / "tokenizer.model")
    args = tiny_args(vocab_size=400)
    return save_meta(directory / "model", args, tiny_weights(args))


def test_one_message_gives_one_answer_on_standard_output_alone(llama, checkpoint):
    status, out, err = llama("chat", checkpoint, "hello", "--max-tokens", 8, "--temperature", 0, "--max-seq-len", 128)
    assert status == 0
    assert out.endswith("\n")
    assert "Loaded in" in err
    assert "Loaded in" not in out


def test_a_pipe_of_lines_is_a_conversation_without_prompts(llama, checkpoint, monkeypatch):
    dialogs = []
    stream_chat = Llama.stream_chat

    def record(self, dialog, params):
        dialogs.append([dict(message) for message in dialog])
        return stream_chat(self, dialog, params)

    monkeypatch.setattr(Llama, "stream_chat", record)
    lines = [
        "one",
        "",
        "two",
        "/system Be kind.",
        "three",
        "/reset",
        "/system",
        "four",
        "/what",
        "q",
        "never",
    ]
    status, out, err = llama("chat", checkpoint, "--max-tokens", 3, "--seed", 1, stdin="\n".join(lines))
    assert status == 0
    assert len(out.splitlines()) >= 4
    assert ">" not in err
    assert [[m["content"] for m in d if m["role"] == "user"] for d in dialogs] == [
        ["one"],
        ["one", "two"],
        ["one", "two", "three"],
        ["four"],
    ]
    assert [d[0] for d in dialogs if d[0]["role"] == "system"] == [{"role": "system", "content": "Be kind."}]
    assert "/what is no command" in err


@pytest.mark.parametrize("word", ["/quit", "q", "Q"])
def test_a_word_ends_the_conversation(llama, checkpoint, word):
    status, out, _ = llama("chat", checkpoint, stdin=f"{word}\nhello\n")
    assert (status, out) == (0, "")


def test_the_default_system_prompt_is_the_tutorials_one(llama, checkpoint, monkeypatch):
    systems = []
    monkeypatch.setattr(terminal, "stream", lambda chat, message: systems.append(chat.system))
    llama("chat", checkpoint, "hello", "--system", "default")
    llama("chat", checkpoint, "hello", "--system", "Answer in verse.")
    llama("chat", checkpoint, "hello")
    assert systems[0].startswith("You are a helpful, respectful and honest assistant.")
    assert systems[1:] == ["Answer in verse.", None]


def test_the_oldest_turns_leave_when_the_context_is_full(checkpoint):
    llm = Llama.build(checkpoint, max_seq_len=160, dtype="fp32")
    chat = terminal.Chat(llm, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0), "Be brief.")
    for number in range(6):
        assert list(chat.answer(f"message {number}"))
    assert len(chat.turns) == 12
    fitted = chat._fitted([*chat.turns, {"role": "user", "content": "message 6"}])
    assert fitted[0] == {"role": "system", "content": "Be brief."}
    assert fitted[-1]["content"] == "message 6"
    assert len(fitted) < 14


def test_a_message_that_is_refused_does_not_spoil_the_conversation(checkpoint):
    llm = Llama.build(checkpoint, max_seq_len=128, dtype="fp32", device="cpu")
    chat = terminal.Chat(llm, SamplingParams(temperature=0.0, max_tokens=4))
    assert "".join(chat.answer("what does [INST] mean?")) == UNSAFE_ERROR
    assert "".join(chat.answer("hello")) != UNSAFE_ERROR
    assert [turn["content"] for turn in chat.turns[::2]] == ["hello"]


def test_a_batchs_exit_status_says_whether_answers_are_missing(llama, checkpoint, tmp_path):
    body = {"prompt": "hello", "max_tokens": 2, "model": "half \ud83d"}
    good = json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{good}\nnot json\n")
    for _ in range(2):
        status, _, err = llama("batch", source, target, "--model", checkpoint)
        assert status == 1
        assert "1 failed" in err
    source.write_text(good)
    status, _, err = llama("batch", source, target, "--model", checkpoint)
    assert status == 0
    assert "1 answered before" in err
    assert len(target.read_text().splitlines()) == 1


def test_a_message_that_is_too_long_is_told_and_the_conversation_goes_on(llama, checkpoint):
    lines = "word " * 200 + "\nhello\n"
    status, out, err = llama("chat", checkpoint, "--max-seq-len", 64, "--max-tokens", 2, stdin=lines)
    assert status == 0
    assert "only" in err
    assert "fit" in err
    assert len(out.splitlines()) >= 1


def test_ctrl_c_ends_the_answer_and_not_the_conversation(checkpoint, capsys):
    llm = Llama.build(checkpoint, max_seq_len=256, dtype="fp32")
    chat = terminal.Chat(llm, SamplingParams(ignore_eos=True, temperature=0.0))
    answer, handler = llm.stream_chat, signal.getsignal(signal.SIGINT)

    def interrupted(dialog, params):
        for number, piece in enumerate(answer(dialog, params)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    llm.stream_chat = interrupted
    terminal.stream(chat, "hello")
    llm.engine.step()
    assert chat.turns[0]["content"] == "hello"
    assert 0 < len(llm.tokenizer.encode(chat.turns[1]["content"], False, False)) < 20
    assert llm.engine.stats().num_referenced_blocks == 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_ends_a_command_with_its_status_and_a_word(llama, checkpoint, monkeypatch):
    def interrupted(*_):
        yield "Once"
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "stream_text", interrupted)
    status, out, err = llama("complete", checkpoint, "--prompt", "quick fox", "--stream")
    assert (status, out) == (130, "Once")
    assert err.endswith("llama: stopped\n")


def test_a_second_ctrl_c_ends_the_program():
    with terminal.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.pressed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_complete_prints_the_same_text_streamed_or_not(llama, checkpoint):
    options = ("--prompt", "quick fox", "--max-tokens", 12, "--seed", 3)
    status, whole, _ = llama("complete", checkpoint, *options)
    assert status == 0
    assert llama("complete", checkpoint, *options, "--stream")[1] == whole
    assert llama("complete", checkpoint, *options, "--echo")[1] == "quick fox" + whole
    assert llama("complete", checkpoint, "--max-tokens", 12, "--seed", 3, stdin="quick fox")[1] == whole


def test_complete_gives_an_answer_its_shape(llama, checkpoint, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": [{"a": 1}, ["b", 2]]}')
    (tmp_path / "number.gbnf").write_text('root ::= "<" [0-9] [0-9] ">"')
    complete = ("complete", checkpoint, "--prompt", "quick fox", "--max-tokens", 60, "--seed", 3)
    assert json.loads(llama(*complete, "--json-schema", tmp_path / "schema.json")[1]) in ({"a": 1}, ["b", 2])
    assert re.fullmatch(r"[ab]{3}\n", llama(*complete, "--regex", "[ab]{3}", "--stream")[1])
    assert re.fullmatch(r"<\d\d>\n", llama(*complete, "--grammar", tmp_path / "number.gbnf")[1])
    status, out, err = llama(*complete, "--regex", "(?=a)b")
    assert (status, out) == (1, "")
    assert "look-around" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["chat", "--temprature", "1"], 2, "No such option: --temprature"),
        (["chatt"], 2, "No such command 'chatt'"),
        (["complete", "--max-seq-len", "none", "--prompt", "x"], 2, "--max-seq-len"),
        (["chat", "/no/such/model"], 1, "/no/such/model: no such file or directory"),
        (["complete", "no-such-file.gguf", "--prompt", "x"], 1, "no-such-file.gguf: no such file"),
        (["complete", "--prompt", "x", "--top-p", "2"], 1, "top_p must be"),
        (["complete", "--prompt", "x", "--dtype", "int3"], 1, "dtype is 'int3'"),
        (["chat", "hello", "--chat-format", "klingon"], 1, "klingon"),
        (["chat", "hello", "--tool-format", "klingon"], 1, "unknown tool format 'klingon': give one of hermes, "),
    ],
)
def test_a_wrong_call_is_told_in_one_line(llama, arguments, status, message):
    found, out, err = llama(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("Loaded in")]
    assert (found, out) == (status, "")
    assert len(lines) == 1
    assert lines[0].startswith("llama: ")
    assert message in lines[0]


def test_an_empty_directory_is_told_in_one_line(llama, tmp_path):
    status, _, err = llama("chat", tmp_path, "hello")
    assert status == 1
    assert err.count("\n") == 1
    assert "a directory must hold" in err


def test_a_lone_argument_is_a_message_unless_it_names_a_model(checkpoint):
    for name in (checkpoint, "missing.gguf", "models/missing", "/no/such", "~/model", "org/name:Q4_K_M"):
        assert command_line.names_a_model(str(name))
    for message in (
        "hello",
        "either / or?",
        "Explain how a boat sails against the wind. " * 20,
        "x" * 300,
        "请比较TCP/IP和UDP的区别",
        "https://example.com/page",
        "~5kg?",
        "/home/x is what?",
        "What is in\n/home/x?",
    ):
        assert not command_line.names_a_model(message)


def test_a_message_that_reads_like_a_name_is_told_another_way_in(llama, monkeypatch):
    def missing(model, load):
        raise FileNotFoundError(f"{model}: no such directory")

    monkeypatch.setattr(command_line, "build", missing)
    hint = "if it is a message: echo TCP/IP | llama chat"
    assert hint in llama("chat", "TCP/IP")[2]
    assert "if it is a message" not in llama("chat", "TCP/IP", "hello")[2]
    assert "if it is a message" not in llama("chat", "/no/such/model")[2]


def test_the_rule_for_models_and_messages_stands_in_the_help(llama):
    _, out, _ = llama("chat", "--help")
    assert "is a MODEL if" in out


@pytest.mark.parametrize("arguments", [["chat", ""], ["chat", " \n"], ["chat", "model", ""]])
def test_an_empty_message_is_refused_in_words(llama, arguments):
    status, out, err = llama(*arguments)
    assert (status, out) == (2, "")
    assert "the message is empty" in err


def test_what_a_file_says_of_itself_cannot_move_the_cursor(capsys):
    found = Finding(False, "tok_embeddings\x1b[2J", "not there\x9b1A")
    report.show_findings([found])
    assert capsys.readouterr().out == "BAD  tok_embeddings[2J: not there1A\n"


def test_a_message_and_what_comes_through_a_pipe_are_one(llama, checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(terminal, "stream", lambda chat, message: asked.append(message))
    llama("chat", checkpoint, "Repeat this:", stdin="purple\nelephants\n")
    llama("chat", checkpoint, "Repeat this:", stdin=" \n")
    assert asked == ["Repeat this:\n\npurple\nelephants\n", "Repeat this:"]


@pytest.mark.parametrize("line", ["/home/x is what?", "/etc/passwd", "/sys is what?", "/", "/2 or /3?"])
def test_a_line_that_begins_with_a_path_is_a_message(line):
    assert terminal.Chat(llm=None, params=None).command(line) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["complete", "--prompt", "quick fox"],
        ["complete", "--prompt", "quick fox", "--stream"],
        ["chat", "quick fox"],
    ],
)
def test_escape_codes_of_a_model_reach_no_terminal(llama, checkpoint, monkeypatch, arguments):
    hostile = "a\x1b]0;title\x07b\x9b31m\n\tc"
    monkeypatch.setattr(Llama, "stream_chat", lambda *_: iter([hostile]))
    monkeypatch.setattr(Llama, "stream_text", lambda *_: iter([hostile]))
    monkeypatch.setattr(Llama, "complete", lambda *_: [Completion(hostile, [], "stop")])
    assert llama(arguments[0], checkpoint, *arguments[1:])[1] == "a]0;titleb31m\n\tc\n"


def test_each_start_answers_anew_unless_a_seed_is_given(llama, checkpoint):
    options = ("complete", checkpoint, "--prompt", "quick fox", "--max-tokens", 24, "--temperature", 2)
    assert llama(*options)[1] != llama(*options)[1]
    assert llama(*options, "--seed", 3)[1] == llama(*options, "--seed", 3)[1]


def test_a_chat_in_a_terminal_shows_a_prompt_and_ends_on_a_line_of_its_own(checkpoint, tmp_path):
    screen = Terminal([*LLAMA, "chat", str(checkpoint), "--max-tokens", "4", "--history", str(tmp_path / "h")])
    screen.wait_for("--seed ")
    screen.wait_for(READY)
    screen.type("one\\\rtwo\r")
    screen.wait_for(READY)
    screen.type("\x04")
    status, shown, _ = screen.end()
    assert status == 0
    assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown).endswith("\n")
    assert "+one\n+two\n" in (tmp_path / "h").read_text()


def test_a_chat_whose_output_goes_through_a_pipe_still_shows_its_prompt(checkpoint):
    screen = Terminal([*LLAMA, "chat", str(checkpoint), "--max-tokens", "4", "--temperature", "0"], output_in_pipe=True)
    assert "--seed" not in screen.wait_for(READY)  # nothing to repeat where the likeliest token is taken
    screen.type("hello\r")
    screen.wait_for(READY)
    screen.type("\x04")
    status, _, output = screen.end()
    assert status == 0
    assert output.endswith("\n")
    assert "hello" not in output


def test_closed_streams_and_what_an_encoding_lacks_cost_no_answer(checkpoint):
    options = ["--prompt", "😀 é", "--echo", "--max-tokens", "1"]
    done = subprocess.run(
        f"{shlex.join([*LLAMA, 'complete', str(checkpoint), *options])} <&- 2>&-",
        shell=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"? ?")


def test_a_context_beyond_the_models_own_is_warned_of(llama, checkpoint):
    options = ("complete", checkpoint, "--prompt", "quick fox", "--max-tokens", 1, "--max-seq-len")
    status, _, err = llama(*options, 8192)
    assert status == 0
    assert "max_seq_len is 8192, but the model was made for 4096 tokens" in err
    assert "Rope scaling by 2 or more" in err
    assert "made for" not in llama(*options, 4096)[2]


def test_a_reader_that_leaves_early_gets_no_traceback(checkpoint):
    process = subprocess.Popen(
        [*LLAMA, "complete", str(checkpoint), "--prompt", "a", "--max-tokens", "100", "--stream"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()


EXAMPLES = ["example_chat_completion.py", "example_text_completion.py"]


@pytest.mark.parametrize("script", EXAMPLES)
def test_the_examples_take_the_references_flags(checkpoint, script, monkeypatch, capsys):
    flags = f"--ckpt_dir {checkpoint} --tokenizer_path {checkpoint.parent / 'tokenizer.model'} --temperature 0"
    flags += " --max_seq_len 1000 --max_batch_size 6 --max_gen_len 4"
    monkeypatch.setattr(sys, "argv", [script, *flags.split()])
    run_path(ROOT / script, run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith("Loaded in ")
    assert out.count("\n==================================\n") == {"c": 6, "t": 4}[script[8]]
    assert "\n> " in out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--ckpt_dirr x --max_gen_len 2", 2, "Could not consume arg: --ckpt_dirr"),
        ("a b 0.3 0.9 10 10 10 10", 2, "Could not consume arg: 10"),
        ("--ckpt_dir /no/such/model", 1, "example_chat_completion.py: /no/such/model: no such file"),
    ],
)
def test_a_script_refuses_a_wrong_call_before_a_model_loads(monkeypatch, capsys, flags, status, message):
    monkeypatch.setattr(sys, "argv", ["example_chat_completion.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        run_path(ROOT / "example_chat_completion.py", run_name="__main__")
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("script", EXAMPLES)
@pytest.mark.parametrize(
    ("model", "given", "expected"), [("m", {}, 0.6), (None, {}, 0.2), (None, {"temperature": 1.0}, 1.0)]
)
def test_an_example_takes_the_default_models_own_settings_and_says_what_it_is(
    monkeypatch, capsys, script, model, given, expected
):
    asked = []

    class Recorder:
        rank = 0

        def chat_completion(self, prompts, **options):
            asked.append(options)
            return [{"generation": {"role": "assistant", "content": "Hello."}}] * len(prompts)

        def text_completion(self, prompts, **options):
            asked.append(options)
            return [{"generation": "Hello."}] * len(prompts)

    monkeypatch.setattr(Llama, "build", lambda **_: Recorder())
    run_path(ROOT / script)["main"](model, **given)
    assert asked[0]["temperature"] == expected
    assert asked[0]["top_p"] == 0.9
    assert (asked[0]["max_gen_len"] == 64) == (model is None or "text" in script)
    assert ("a small model" in capsys.readouterr().out) == (model is None)
