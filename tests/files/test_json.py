from pathlib import Path

from llama.files.json import json_bytes, parse_json


def test_half_a_surrogate_pair_is_written_as_it_was_read():
    value = parse_json(b'{"chat_template": "\\ud83d and \xc3\xa9"}', Path("config.json"))
    assert json_bytes(value) == b'{\n  "chat_template": "\\ud83d and \xc3\xa9"\n}\n'
    assert parse_json(json_bytes(value), Path("config.json")) == value
