"""The adapters beside the served model: which there are, and with which of them a request is answered."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock

from llama.adapting import read_adapters
from llama.checkpoint import open_weighted
from llama.generation import Llama
from llama.server.engine_thread import EngineThread
from llama.service import Refusal
from llama.service.fields import Body, LoraScale

MOST_MIXES = 16  # of adapters at other strengths, which are kept for requests that ask for the same again


@dataclass(eq=False)
class ServedAdapter:
    """One of them. `scale`: how strong it is for requests that choose none themselves."""

    name: str
    id: int  # llama.cpp's
    path: str | Path
    scale: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def file_name(self) -> str:
        """Of the file or directory: where that lies is nobody's business."""
        return Path(self.path).name


class ServedAdapters:
    """The adapters of one model. Files are read in the caller's thread, and attached between two steps.

    A request names one as its model, or gives `lora`, numbers with strengths; else it gets what all get (`set_scales`).
    An adapter at another strength, or several at once, are one more adapter of the model, a mix, which nobody sees.
    `choose` and what changes something may be called from any thread but the event loop's.
    """

    def __init__(self, llm: Llama, thread: EngineThread):
        self._llm = llm
        self._thread = thread
        self._ids = count()
        self._by_name = {name: ServedAdapter(name, next(self._ids), path) for name, path in llm.adapter_paths.items()}
        self._mixes: OrderedDict[str, dict[str, float]] = OrderedDict()  # by the model's name of them, the latest last
        self._lock = Lock()  # around whatever changes

    def __iter__(self) -> Iterator[ServedAdapter]:
        return iter(list(self._by_name.values()))

    def find(self, name: str) -> ServedAdapter | None:
        return self._by_name.get(name)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def load(self, name: str, path: str | Path, in_place: bool = False) -> None:
        """Puts an adapter beside the model, `in_place` of one of that name: requests with that end on its weights.

        Raises FileNotFoundError or ValueError, in one line.
        """
        with self._lock:
            old = self._by_name.get(name) if in_place else None
            self._attach(name, str(path), replaces=old is not None)
            if old is None:
                self._by_name[name] = ServedAdapter(name, next(self._ids), path)
            else:
                self._by_name[name] = ServedAdapter(name, old.id, path, old.scale)
            self._drop_mixes_of(name)

    def unload(self, name: str) -> None:
        """Nobody may name it any more; requests with it end with it. Raises ValueError for an unknown name."""
        with self._lock:
            self._thread.ask(lambda: self._thread.call("unload_adapter", name)).result()
            del self._by_name[name]
            self._drop_mixes_of(name)

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """How strong which adapters are for requests that choose none; all others are off for those."""
        self._named(scales)
        for adapter in self:
            adapter.scale = scales.get(adapter.name, 0.0)

    def scales_of(self, given: Sequence[LoraScale]) -> dict[str, float]:
        """By name. Raises Refusal for a number that no adapter has."""
        names = {adapter.id: adapter.name for adapter in self}
        for one in given:
            if one.id not in names:
                there = ", ".join(f"{id} ({name})" for id, name in names.items()) or "none"
                raise Refusal(f"lora holds the id {one.id}: there are {there}", param="lora")
        return {names[one.id]: one.scale for one in given}

    def choose(self, names: Collection[str], llm: Llama, body: Body) -> str | None:
        """The model's name of what a body is answered with; None is the model alone. Raises Refusal.

        `names` are those that the body may give: one that was unloaded meanwhile is not answered by the model instead.
        """
        if (given := getattr(body, "lora", None)) is not None:
            return self._named(self.scales_of(given))
        if body.model in names:
            return body.model
        return self._named({adapter.name: adapter.scale for adapter in self})

    def _named(self, scales: Mapping[str, float]) -> str | None:
        """What the model calls adapters that are so strong. Raises Refusal where there can be no such mix."""
        scales = {name: scale for name, scale in scales.items() if scale}
        if not scales:
            return None
        if list(scales.values()) == [1.0]:
            return next(iter(scales))
        name = " + ".join(f"{scale!r} * {name}" for name, scale in sorted(scales.items()))
        with self._lock:
            if name not in self._mixes:
                self._mix(name, scales)
            self._mixes.move_to_end(name)
        return name

    def _mix(self, name: str, scales: Mapping[str, float]) -> None:
        paths = {one: self._by_name[one].path for one in scales}
        try:
            self._attach(
                name, *(f"{paths[one]}={scale!r}" if scale != 1 else paths[one] for one, scale in scales.items())
            )
        except (OSError, ValueError) as error:
            message = str(error)
            for one, path in paths.items():
                message = message.replace(str(path), one)
            raise Refusal(f"lora: {message}", param="lora") from error
        self._mixes[name] = dict(scales)
        if len(self._mixes) > MOST_MIXES:
            self._drop_mix(next(iter(self._mixes)))

    def _drop_mixes_of(self, adapter: str) -> None:
        for name in [name for name, scales in self._mixes.items() if adapter in scales]:
            self._drop_mix(name)

    def _drop_mix(self, name: str) -> None:
        del self._mixes[name]
        self._thread.ask(lambda: self._thread.call("unload_adapter", name)).result()

    def _attach(self, name: str, *paths: str | Path, replaces: bool = False) -> None:
        """Puts the sum of adapters beside the model.

        Several ranks read them together, between two steps; this one before that alone, so that what cannot be read is
        found out while nobody waits, and the files are in memory.
        """
        llm, thread = self._llm, self._thread
        if not replaces:
            llm.engine.adapters.validate_new(name)
        read = None
        if llm.model.parallel.size == 1:
            read = read_adapters(paths, llm.model)
        else:
            _ = [open_weighted(path).fitted(llm.model.params).digest for path in paths]

        def attach() -> None:
            if replaces:
                thread.call("unload_adapter", name)
            if read is None:
                thread.call("load_adapter", name, [str(path) for path in paths])
            else:
                llm.engine.load_adapter(name, *read)

        thread.ask(attach).result()
