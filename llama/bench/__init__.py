"""How fast this engine is here, beside the machine's limits and its peers: what `llama bench` measures."""
