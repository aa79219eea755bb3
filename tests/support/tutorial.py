"""What the tutorials' client sends: the body of accelerate_client.py, field for field."""

CLIENT_FIELDS = {
    "n": 1,
    "best_of": 1,
    "presence_penalty": 1.2,
    "frequency_penalty": 0.2,
    "temperature": 0.3,
    "top_p": 0.95,
    "top_k": 50,
    "use_beam_search": False,
    "stop": [],
    "ignore_eos": False,
    "logprobs": None,
    "max_new_tokens": 2048,
}
