"""The tutorials' way to start a server, in our own options.

    llama serve --model_path DIR --gpus 0,1 --infer_dtype int8 --model_source llama2_chinese
    llama serve --model llama-7b-hf --lora Llama2-7b --cpu

Sources: the flags of scripts/api/accelerate_server.py of Llama2-Chinese; those of text-generation-webui's server.py,
which looks for models in models/ and for adapters in loras/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.streams import tell

TUTORIAL_PORT = 8001  # where its client looks for the server
FOLDERS_HERE = {"model_dir": Path("models"), "lora_dir": Path("loras")}
QUANTIZATIONS = {"int4": "sym_int4", "int8": "sym_int8", "float16": None}
SOURCE_FORMATS = {"llama2_chinese": "atom", "llama2_meta": "llama2", "llama3_meta": "llama3"}


@dataclass(frozen=True)
class TutorialOptions:
    """What was given of them; raises ValueError for what they do not have.

    gpus: numbers of graphics cards, joined by commas. infer_dtype: int8 where a model_path is given without one, as the
    tutorials' server has it. model_source: whose chat format the model was trained on; None: the model's own.
    """

    model_path: str | None = None
    gpus: str | None = None
    infer_dtype: str | None = None
    model_source: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("infer_dtype", QUANTIZATIONS), ("model_source", SOURCE_FORMATS)):
            given = getattr(self, name)
            if given is not None and given not in allowed:
                raise ValueError(f"--{name} is {given!r}: give {', '.join(allowed)}")
        if self.gpus is not None and not re.fullmatch(r"\d+(,\d+)*", self.gpus):
            raise ValueError(f"--gpus is {self.gpus!r}: give numbers of graphics cards, as 0 or 0,1")

    @property
    def is_given(self) -> bool:
        return self != TutorialOptions()

    @property
    def environment(self) -> dict[str, str]:
        """What has to be set before anybody looks for graphics cards."""
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}

    def load(self, *, has_gpu: bool, is_low_bit: bool) -> dict[str, Any]:
        """Parameters of `Llama.build`. has_gpu: of those that are visible. is_low_bit: the checkpoint is, already."""
        load: dict[str, Any] = {}
        if self.gpus is not None:
            load["device"] = "cuda" if has_gpu else "cpu"
        infer_dtype = self.infer_dtype or ("int8" if self.model_path else None)
        if infer_dtype == "float16" and has_gpu:
            load["dtype"] = "fp16"
        elif infer_dtype is not None and QUANTIZATIONS[infer_dtype] and not is_low_bit:
            load["quantization"] = QUANTIZATIONS[infer_dtype]
        if self.model_source is not None:
            load["chat_format"] = SOURCE_FORMATS[self.model_source]
        return load

    def warnings(self, *, has_gpu: bool, num_ranks: int) -> list[str]:
        if self.gpus is None:
            return []
        if not has_gpu:
            return [f"--gpus {self.gpus}: there is no such graphics card; the model runs on the processor"]
        num_gpus = self.gpus.count(",") + 1
        if num_gpus == num_ranks:
            return []
        return [
            f"--gpus {self.gpus}: {num_ranks} of {num_gpus} will be used; "
            f"torchrun --nproc_per_node {num_gpus} -m llama serve ... shares the model among them"
        ]


def folders_here(given: dict[str, Any]) -> dict[str, Any]:
    """The folders of models and adapters that stand here, as text-generation-webui has them, where none are given."""
    return {name: path for name, path in FOLDERS_HERE.items() if name not in given and path.is_dir()}


def chosen_adapters(given: Sequence[str], folder: Path | None) -> tuple[list[str], dict[str, str]]:
    """What `--lora` was given: adapters to be merged into the model, and those beside it, by name.

    DIR, or DIR=0.7, is merged; NAME=DIR stands beside the model under that name. A DIR that is not there is looked for
    in the folder of adapters.
    """
    from llama.checkpoint import located_adapter

    merged, beside = [], {}
    for one in given:
        name, _, rest = one.partition("=")
        if found := located_adapter(one, folder):
            merged.append(found)
        elif name and (found := located_adapter(rest, folder)):
            beside[name] = found
        else:
            merged.append(one)  # whoever opens it says what is wrong
    return merged, beside


def tutorial_load(options: TutorialOptions) -> dict[str, Any]:
    """What `Llama.build` is to be given for them, with their graphics cards alone in sight; warnings are told."""
    os.environ.update(options.environment)
    import torch

    from llama.checkpoint import open_checkpoint, resolve
    from llama.parallel import num_launched

    has_gpu = torch.cuda.is_available()
    for warning in options.warnings(has_gpu=has_gpu, num_ranks=num_launched()):
        tell(f"llama: warning: {warning}")
    weights = open_checkpoint(resolve(options.model_path)).weights() if options.model_path else ()
    return options.load(has_gpu=has_gpu, is_low_bit=any(weight.is_packed for weight in weights))
