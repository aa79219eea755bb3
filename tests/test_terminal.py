"""The command line as a person meets it: answers on standard output, everything else on standard error."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.meta_files import save_meta, save_tokenizer
from support.tiny import tiny_args, tiny_weights

from llama import __main__ as command_line
from llama import terminal
from llama.generation import Llama
from llama.sampling import SamplingParams

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("terminal")
    save_tokenizer(directory / "tokenizer.model")
    args = tiny_args(vocab_size=400)
    return save_meta(directory / "model", args, tiny_weights(args))


@pytest.fixture
def llama(monkeypatch, capsys):
    """Runs a command in this process: (status, standard output, standard error)."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            command_line.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_one_message_gives_one_answer_on_standard_output_alone(llama, checkpoint):
    status, out, err = llama(
        "chat", checkpoint, "hello", "--max-tokens", 8, "--temperature", 0, "--max-seq-len", 128
    )
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


def test_a_second_ctrl_c_ends_the_program():
    with terminal.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.pressed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert terminal.printable("a\x1b[31mb\x07\n\tc\x9b") == "a[31mb\n\tc"


def test_complete_prints_the_same_text_streamed_or_not(llama, checkpoint):
    options = ("--prompt", "quick fox", "--max-tokens", 12, "--seed", 3)
    status, whole, _ = llama("complete", checkpoint, *options)
    assert status == 0
    assert llama("complete", checkpoint, *options, "--stream")[1] == whole
    assert llama("complete", checkpoint, *options, "--echo")[1] == "quick fox" + whole
    assert llama("complete", checkpoint, "--max-tokens", 12, "--seed", 3, stdin="quick fox")[1] == whole


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
    assert command_line.names_a_model(str(checkpoint))
    assert command_line.names_a_model("missing.gguf")
    assert command_line.names_a_model("models/missing")
    assert not command_line.names_a_model("hello")
    assert not command_line.names_a_model("either / or?")


def test_a_reader_that_leaves_early_gets_no_traceback(checkpoint):
    command = [
        sys.executable,
        "-m",
        "llama",
        "complete",
        str(checkpoint),
        "--prompt",
        "a",
        "--max-tokens",
        "100",
    ]
    process = subprocess.Popen(
        [*command, "--stream"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()


@pytest.mark.parametrize("script", ["example_chat_completion.py", "example_text_completion.py"])
def test_the_examples_take_the_references_flags(checkpoint, script):
    flags = (
        f"--ckpt_dir {checkpoint} --tokenizer_path {checkpoint.parent / 'tokenizer.model'} --temperature 0"
    )
    flags += " --max_seq_len 1000 --max_batch_size 6 --max_gen_len 4"
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags.split()],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.startswith("Loaded in ")
    assert done.stdout.count("\n==================================\n") == {"c": 6, "t": 4}[script[8]]
    assert "\n> " in done.stdout
