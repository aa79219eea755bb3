"""`llama serve`: the endpoints of `llama.service` over HTTP, on one engine. Needs the extra [server]."""
