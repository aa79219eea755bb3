"""A native-PyTorch engine for Llama models: any device, any checkpoint, any number of ranks."""

import os

# Between two parallel loops torch's threads (GNU OpenMP) wait for each other by spinning. Beside another busy process
# that burns the very time slices the slower thread is waiting for: answers came ten times later. Sleeping costs nothing
# that could be measured. Read when torch is first imported; a value that the user has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "100")

from llama.chat import Dialog
from llama.generation import Llama
from llama.model import ModelArgs, Transformer
from llama.sampling_params import SamplingParams
from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "SamplingParams", "Tokenizer", "Transformer"]
