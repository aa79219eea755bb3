"""Continues four texts: torchrun --nproc_per_node 1 example_text_completion.py [--ckpt_dir DIR ...]"""

from llama import Llama
from llama.checkpoint import DEFAULT_ABOUT
from llama.program import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float | None = None,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
) -> None:
    """Prints a model's continuations.

    Args:
        ckpt_dir: the model's directory or file; the embedded default model if it is left out.
        tokenizer_path: the tokenizer's file; found in the checkpoint or beside it if it is left out.
        temperature: how freely to sample; 0 always takes the likeliest token. 0.6 if it is left out,
            or 0.2 for the default model, as its makers recommend.
        top_p: sample among the likeliest tokens that together reach this probability.
        max_seq_len: the most tokens that a prompt and its continuation may have together.
        max_gen_len: the most tokens of a continuation.
        max_batch_size: how many prompts are expected at once.
    """
    if temperature is None:
        temperature = 0.2 if ckpt_dir is None else 0.6

    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )

    prompts = [
        # The model continues the text.
        "I believe the meaning of life is",
        "Simply put, the theory of relativity states that ",
        """A brief message congratulating the team on the launch:

        Hi everyone,

        I just """,
        # A few examples in the prompt show the model what is wanted.
        """Translate English to French:

        sea otter => loutre de mer
        peppermint => menthe poivrée
        plush giraffe => girafe peluche
        cheese =>""",
    ]
    results = generator.text_completion(
        prompts,
        max_gen_len=max_gen_len,
        temperature=temperature,
        top_p=top_p,
    )

    if generator.rank != 0:
        return
    if ckpt_dir is None:
        print(f"This is {DEFAULT_ABOUT}; --ckpt_dir DIR gives a better one.\n")
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    run_script(main)
