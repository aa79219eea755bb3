"""A native-PyTorch engine for Llama models: any device, any checkpoint, any number of ranks."""

from llama.chat import Dialog
from llama.generation import Llama
from llama.model import ModelArgs, Transformer
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "SamplingParams", "Tokenizer", "Transformer"]
