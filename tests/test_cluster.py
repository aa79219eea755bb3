"""What replicas get of a cluster, and what keeps them from running: nothing here begins one."""

import builtins
import socket
import sys

import pytest

from llama import cluster
from llama.cluster import ModelPlan, Share, divide, end_of_trace


@pytest.mark.parametrize(
    ("num_replicas", "processors", "threads"),
    [(1, [2], 2), (2, [2], 1), (3, [16], 5), (4, [16, 16], 8), (3, [16, 16], 8), (5, [16, 4], 4), (16, [16], 1)],
)
def test_processors_are_divided_among_replicas(num_replicas, processors, threads):
    assert divide(num_replicas, processors, 0, "auto") == Share(threads)


def test_a_number_of_threads_that_was_asked_for_is_kept():
    assert divide(2, [16], 0, "auto", threads=3) == Share(3)


@pytest.mark.parametrize(
    ("num_replicas", "num_gpus", "device", "gpus"),
    [(2, 2, "auto", 1), (2, 1, "auto", 0), (2, 4, "cuda", 1), (2, 4, "cpu", 0)],
)
def test_each_replica_gets_a_gpu_where_there_are_enough(num_replicas, num_gpus, device, gpus):
    assert divide(num_replicas, [8], num_gpus, device).gpus == gpus


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, [2], 0, "auto"), "--replicas 3 is more than there are processors: give 2 or less"),
        ((3, [8], 2, "cuda"), "--replicas 3 is more than there are GPUs: give 2 or less"),
        ((2, [2], 0, "auto", 2), "2 replicas of OMP_NUM_THREADS=2 are more than there are processors"),
    ],
)
def test_more_replicas_than_there_is_room_for_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        divide(*arguments)


def test_replicas_on_one_machine_share_its_processors_and_its_free_memory(monkeypatch):
    given = []
    monkeypatch.setattr(cluster.Llama, "build", lambda model, **load: given.append((model, load)))
    monkeypatch.setattr(cluster, "free_memory", lambda device: 8 << 30)
    monkeypatch.setattr(cluster.torch, "set_num_threads", given.append)
    ModelPlan("m", {"device": "cpu"}, 2, Share(3), "/nowhere").build()
    ModelPlan("m", {"kv_cache_memory": "1GiB"}, 2, Share(1), "/nowhere").build()
    assert given == [
        3,
        ("m", {"device": "cpu", "seed": None, "kv_cache_memory": 2 << 30}),
        1,
        ("m", {"kv_cache_memory": "1GiB", "seed": None}),
    ]


def test_an_error_elsewhere_is_told_by_the_last_line_of_its_trace():
    trace = "ray::Worker.__init__()\n  File x\nllama.files.errors.BadFileError: it is damaged\n\n"
    assert end_of_trace(trace) == "it is damaged"
    assert end_of_trace("") == "no reason is known"


# ---- what the commands refuse


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "in.jsonl").touch()
    return tmp_path / "in.jsonl"


@pytest.fixture
def no_ray(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)


@pytest.mark.usefixtures("no_ray")
def test_without_ray_it_is_said_what_to_install(llama, model, lines):
    expected = (1, "", "llama: ray is missing: pip install 'llama-native[ray]'\n")
    assert llama("serve", model, "--replicas", 1, "--port", 0) == expected
    assert llama("batch", lines, lines.with_name("out"), "--model", model, "--replicas", 1) == expected


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--replicas", 0), 2, "Invalid value for '--replicas'"),
        (("--replicas", 99999), 1, "--replicas 99999 is more than there are processors: give "),
        (("--ray-address", "auto"), 2, "--ray-address is auto, but nothing is to run there: give --replicas N too"),
    ],
)
def test_what_goes_with_no_cluster_is_refused_in_a_line(llama, model, lines, arguments, status, message):
    for command in (("serve", model, "--port", 0), ("batch", lines, lines.with_name("out"), "--model", model)):
        found, out, told = llama(*command, *arguments)
        assert (found, out) == (status, "")
        assert message in told
        assert told.count("\n") == 1


def test_a_cluster_that_is_not_there_is_told_at_once(llama, model):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status, _, told = llama("serve", model, "--replicas", 1, "--port", 0, "--ray-address", f"127.0.0.1:{port}")
    assert status == 1
    assert told.startswith(f"llama: there is no Ray cluster at 127.0.0.1:{port} (")
    assert told.endswith("give its head's address, as 10.0.0.1:6379, or auto\n")
    status, _, told = llama("serve", model, "--replicas", 1, "--port", 0, "--ray-address", "nowhere")
    assert (status, told.count("\n")) == (1, 1)
    assert told.startswith("llama: there is no Ray cluster at nowhere (")


def test_what_one_of_many_replicas_would_do_alone_is_refused(llama, model):
    status, _, told = llama("serve", model, "--replicas", 1, "--admin-key", "secret", "--lora-dir", model)
    assert status == 2
    assert told == "llama: --admin-key changes a model or its adapters at one replica alone: leave --replicas out\n"


def test_ranks_have_no_replicas(llama, model, lines, monkeypatch):
    assert llama("batch", lines, lines.with_name("out"), "--replicas", 1, "--pipeline-parallel-size", 2)[2] == (
        "llama: --pipeline-parallel-size is for ranks, and each replica is one process: leave one of them out\n"
    )
    monkeypatch.setenv("RANK", "0")
    assert llama("batch", lines, lines.with_name("out"), "--replicas", 1)[2] == (
        "llama: --replicas begins processes of its own: run it without torchrun\n"
    )


def test_a_model_that_is_not_there_begins_no_cluster(llama, tmp_path):
    status, _, told = llama("serve", tmp_path / "nowhere", "--replicas", 1, "--port", 0)
    assert status == 1
    assert "nowhere" in told
    assert told.count("\n") == 1
