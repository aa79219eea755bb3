"""Milliseconds that one step's sampling takes, beside a twin that sorts every row whole (ratio: twin / ours).

    python benchmarks/sampling.py [--device cpu] [--repeats 15] [--threads N]

Logits are peaked as a language model's are, or, in the lines marked "flat", so even that the nucleus is most of the
vocabulary: the worst case. Both sides run in turn; medians; JSON on the last line.
"""

from __future__ import annotations

import argparse

import torch
from common.timing import alternate, median, report, seconds

from llama.sampling import SampleRow, SamplingParams, sample

MODES = {
    "greedy": {"temperature": 0.0},
    "top_p 0.9": {"temperature": 0.6, "top_p": 0.9},
    "top_k 50, top_p 0.9": {"temperature": 0.6, "top_p": 0.9, "top_k": 50},
}


def make_logits(num_rows: int, vocab_size: int, flat: bool, device: str) -> torch.Tensor:
    """(num_rows, vocab_size) float32: noise, and unless flat a Zipf-like head in a random place of each row."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    if not flat:
        head = 14 - 1.2 * torch.arange(1, 2001).log()
        places = torch.stack([torch.randperm(vocab_size, generator=generator)[:2000] for _ in range(num_rows)])
        logits.scatter_add_(1, places, head.expand(num_rows, -1))
    return logits.to(device)


def naive(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """The reference's manner: softmax, sort all, mask, renormalise, torch.multinomial."""
    if params.temperature <= 0:
        return logits.argmax(-1).tolist()
    ranked, ids = (logits / params.temperature).softmax(-1).sort(dim=-1, descending=True)
    if params.top_k:
        ranked[:, params.top_k :] = 0.0
        ranked /= ranked.sum(-1, keepdim=True)
    ranked[ranked.cumsum(-1) - ranked > params.top_p] = 0.0
    ranked /= ranked.sum(-1, keepdim=True)
    return ids.gather(-1, torch.multinomial(ranked, 1)).squeeze(-1).tolist()


def measure(num_rows: int, vocab_size: int, mode: str, flat: bool, device: str, repeats: int) -> dict:
    logits = make_logits(num_rows, vocab_size, flat, device)
    params = SamplingParams(**MODES[mode]).resolve()
    rows = [SampleRow(params, [], 0, key=(1, 0, i)) for i in range(num_rows)]
    repeats = max(3, min(repeats, 40 * repeats // num_rows))  # the twin takes seconds for 256 large rows
    taken = alternate(  # both end in lists: nothing is left running on the device
        repeats,
        ours=lambda: seconds(lambda: sample(logits, rows)),
        twin=lambda: seconds(lambda: naive(logits, params)),
    )
    ours, twin = (median(taken[side]) * 1e3 for side in ("ours", "twin"))
    name = f"{mode} (flat)" if flat else mode
    print(
        f"{vocab_size:>8} {num_rows:>5}  {name:<20} {ours:>10.3f} {twin:>10.3f} {twin / ours:>8.1f}",
        flush=True,
    )
    return {
        "vocab": vocab_size,
        "rows": num_rows,
        "mode": name,
        "ms": ours,
        "naive_ms": twin,
        "ratio": twin / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{'vocab':>8} {'rows':>5}  {'mode':<20} {'ms':>10} {'naive ms':>10} {'ratio':>8}")
    results = [
        measure(num_rows, vocab_size, mode, False, given.device, given.repeats)
        for vocab_size in (32000, 128256)
        for num_rows in (1, 32, 256)
        for mode in MODES
    ]
    results += [measure(32, size, "top_p 0.9", True, given.device, given.repeats) for size in (32000, 128256)]
    report({"device": given.device, "threads": given.threads, "results": results})


if __name__ == "__main__":
    main()
