"""PEFT directories: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

The tensors' names say which modules there are, and their shapes which ranks; of the config only what changes the
numbers is looked at: https://github.com/huggingface/peft (0.21).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ...files.errors import CheckpointError, shown
from ...files.json import read_json
from ...files.tensor_file import read_tensor_file
from ..arrays import Array
from ..formats.huggingface import canonical_name
from ..settings import Settings
from ..tokenizer_files import NAMES
from .adapter import Adapter, low_rank_of, whole_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MAX_RANK = 1 << 16

_LORA = re.compile(
    r"(?P<module>[\w.]+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$|bias$)\w+)?(\.(?P<kind>weight|bias))?"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.(?!weight$|bias$)\w+)?)(?=\.)")
_PATTERN = re.compile(r"[\w.^$|\\()*+?\[\]-]{1,200}")
_NESTED = re.compile(r"\)[*+?]|[*+?]{2}")
_OTHER_MATHEMATICS = (
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "target_parameters", "trainable_token_indices",
)  # fmt: skip
_NO_EFFECT = (
    "auto_mapping", "revision", "inference_mode", "task_type", "peft_version", "r", "target_modules", "exclude_modules",
    "lora_dropout", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "path_initial_model_for_weight_conversion",
    "lora_plus_lr_ratio", "use_dora", "base_model_class",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that take something from the base model


def is_peft(path: Path) -> bool:
    """Whether `path` is a directory with an adapter of PEFT's."""
    return path.is_dir() and (path / ADAPTER_CONFIG).is_file()


def open_peft(path: Path) -> Adapter:
    """Opens an adapter. Raises CheckpointError, which names the setting, for what cannot be honoured."""
    settings = Settings(read_json(path / ADAPTER_CONFIG), path / ADAPTER_CONFIG)
    scaling = _Scaling(settings)
    found = [path / name for name in ADAPTER_WEIGHTS if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"{path}: {ADAPTER_CONFIG} is there, but neither {' nor '.join(ADAPTER_WEIGHTS)} is")
    stored = read_tensor_file(found[0])
    stored.check()
    parts: dict[str, dict[str, Tensor]] = {}
    stored_names: dict[str, str] = {}
    whole: dict[str, Array] = {}
    stored_as: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        key = key.removeprefix("base_model.model.")
        if match := _LORA.fullmatch(key):
            name = canonical_name(f"{match['module']}.weight").removesuffix(".weight")
            stored_names[name] = match["module"]
            for part, value in _part(stored.path, name, match["part"], match["kind"], tensor):
                if parts.setdefault(name, {}).setdefault(part, value) is not value:
                    raise CheckpointError(f"{stored.path}: {key}: occurs twice")
        else:
            name = canonical_name(_WRAPPED.sub("", key))
            if "original_module" in key.split("."):  # beside what was trained in its place
                continue
            if name in whole and not torch.equal(stored_as[name], tensor):
                raise CheckpointError(f"{stored.path}: {key}: occurs twice, with other numbers")
            stored_as[name] = tensor
            whole[name] = whole_of(stored.path, key, tensor, stored.check)
    if not parts and not whole:
        raise CheckpointError(f"{stored.path}: holds no tensors")
    low_rank = {
        name: low_rank_of(stored.path, name, those, scaling.alpha(stored_names[name]), scaling.is_root)
        for name, those in parts.items()
    }
    if settings.boolean("use_dora", False):
        without = next((name for name, one in low_rank.items() if one.magnitude is None), None)
        if without is not None:
            raise CheckpointError(f"{stored.path}: {without}: use_dora is true, but there is no magnitude")
    base = settings.text("base_model_name_or_path")
    return Adapter(
        path,
        "peft",
        (path / ADAPTER_CONFIG, stored.path),
        low_rank,
        whole,
        base=base or None,
        tokenizer_path=next((path / name for name in reversed(NAMES) if (path / name).is_file()), None),
        unknown_keys=settings.unknown,
    )


def _part(file: Path, name: str, part: str, kind: str | None, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Which part of a LowRank a tensor is. An embedding's are the other way round: a row of A^T is a token's."""
    match part, kind:
        case "lora_A", "weight" | None:
            return [("a", tensor)]
        case "lora_B", "weight" | None:
            return [("b", tensor)]
        case "lora_B", "bias":
            return [("bias", tensor)]
        case "lora_embedding_A", "weight" | None:
            return [("b", tensor.mT)]
        case "lora_embedding_B", "weight" | None:
            return [("a", tensor.mT)]
        case "lora_magnitude_vector", "weight" | None:
            return [("magnitude", tensor)]
    raise CheckpointError(f"{file}: {name}: {part}.{kind} is not known")


class _Scaling:
    """What the config says of scales, and that it asks for nothing else."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        kind = settings.text("peft_type", "LORA")
        if kind != "LORA":
            raise CheckpointError(f"{settings.file}: peft_type {shown(kind)} is not supported; LORA is")
        for key in _OTHER_MATHEMATICS:
            settings.refuse(key, False, [], {})
        settings.integer("r", 1, high=MAX_RANK)
        begin = settings.values.get("init_lora_weights")
        settings.ignore("init_lora_weights", *_NO_EFFECT)
        if isinstance(begin, str) and begin.lower().startswith(CHANGES_BASE):
            raise CheckpointError(
                f"{settings.file}: init_lora_weights = {shown(begin)} is not supported: training began with another "
                "base model; save the adapter with path_initial_model_for_weight_conversion"
            )
        self.is_root = settings.boolean("use_rslora", False)
        self._alpha = settings.number("lora_alpha", 8.0, low=-1e30)
        patterns = settings.section("alpha_pattern")
        self._patterns: dict[re.Pattern[str], float] = {}
        for key in patterns.values if patterns else ():
            self._patterns[self._compiled(key)] = patterns.number(key, low=-1e30)

    def alpha(self, module: str) -> float:
        """Of a module under its stored name: the first pattern that its end matches, else `lora_alpha`."""
        return next((alpha for pattern, alpha in self._patterns.items() if pattern.match(module)), self._alpha)

    def _compiled(self, key: str) -> re.Pattern[str]:
        """A pattern of a file that nobody vouches for: it may not be one that takes for ever."""
        is_slow = _NESTED.search(key) or sum(map(key.count, "*+?")) > 3
        try:
            if not _PATTERN.fullmatch(key) or is_slow:
                raise ValueError("it is too complicated")
            return re.compile(rf"(.*\.)?({key})$")
        except (ValueError, re.error) as error:
            raise CheckpointError(f"{self.settings.file}: alpha_pattern: {shown(key)}: {error}") from error
