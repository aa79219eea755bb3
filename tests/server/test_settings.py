import pytest

from llama.server.settings import ServerSettings, listed


def test_keys_come_one_by_one_or_joined_and_from_a_file_s_lines(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n d \n\ne\n")
    assert ServerSettings(api_key=["a, b", "c", ""], api_key_file=file).keys() == ["a", "b", "c", "d", "e"]
    assert ServerSettings().keys() == []


def test_an_admin_key_has_to_be_one_that_clients_can_send():
    for key in ("", "two words"):
        with pytest.raises(ValueError, match="the admin key has spaces"):
            ServerSettings(admin_key=key).keys()


@pytest.mark.parametrize("key", ["schlüssel", "two words", "\udc80", "a\tb"])
def test_a_key_that_no_client_can_send_is_refused_without_being_shown(key):
    with pytest.raises(ValueError, match=r"API key 2 of 2 has spaces or other than ASCII") as refused:
        ServerSettings(api_key=["fine", key]).keys()
    assert key not in str(refused.value)


def test_a_file_without_a_key_is_no_open_door(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match=r"has no API key: write one a line"):
        ServerSettings(api_key_file=file).keys()


def test_values_come_one_by_one_or_joined():
    assert listed(["a.example, b.example", "c.example", ""]) == ["a.example", "b.example", "c.example"]
    assert listed(None) == []
