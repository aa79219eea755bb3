"""A native-PyTorch engine for Llama models: any device, any checkpoint, any number of ranks."""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

# Between two parallel loops torch's threads (GNU OpenMP) wait for each other by spinning, for milliseconds. Beside
# another busy process that burns the very time slices the slower thread is waiting for: answers came ten times later.
# For some ten microseconds they may: a layer's next product is that near, and on a virtual machine waking a thread
# takes longer than a small product. Read when torch is first imported; a value that the user has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# A name is imported when it is first asked for: a command that shows its help or refuses a call needs no torch.
if TYPE_CHECKING:
    from llama.chat import Dialog
    from llama.generation import Llama
    from llama.model import ModelArgs, Transformer
    from llama.sampling_params import SamplingParams
    from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "SamplingParams", "Tokenizer", "Transformer"]
_MODULES = {
    "Dialog": "chat",
    "Llama": "generation",
    "ModelArgs": "model",
    "SamplingParams": "sampling_params",
    "Tokenizer": "tokenizer",
    "Transformer": "model",
}


@contextmanager
def _without_collections() -> Iterator[None]:
    """The garbage collector rests, and then takes all that there is for old.

    What an import makes stays. Torch makes so much that the collector, which looks through it again and again for what
    might be gone, takes a tenth of the start. Were it merely to rest, it would catch up as soon as it is back.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else these are somebody's, and not ours to thaw
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        gc.enable()


def __getattr__(name: str) -> object:
    """A public name, or a module of the package, as if it had been imported here."""
    module = f"llama.{_MODULES.get(name, name)}"
    try:
        with _without_collections():
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise AttributeError(f"module 'llama' has no attribute {name!r}") from None
    if name not in _MODULES:
        return found
    globals()[name] = getattr(found, name)  # so that the next one who asks finds it there
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
