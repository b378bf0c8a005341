"""Objects of other programs in a file of torch: which are accepted, without importing them."""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint

from jepa_audio.class_paths import is_trusted

# Objects that hyper-parameters contain in addition to plain values: modules of torch without
# weights, optimizers, and containers of data. A `StoredObject` replaces them, so none of their code
# runs.
_HARMLESS = re.compile(
    r"torch\.nn\.modules\.\w+\.[A-Z]\w*|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+"
    r"|torch\.optim\.(\w+\.)?[A-Z]\w*|omegaconf(\.\w+){1,2}|numpy(\.\w+){1,3}"
    r"|builtins\.(int|float|str|bool|bytes|list|dict|tuple|set|frozenset|object)"
    r"|(argparse|types)\.\w*Namespace|functools\.partial|collections\.(defaultdict|deque)"
    r"|(pathlib(\._local)?|typing|enum|datetime)\.\w+|(pytorch_)?lightning[\w.]*\.AttributeDict"
)


class StoredObject(dict[Any, Any]):
    """Stands for an object in a file whose class is not imported.

    Attributes:
        path: module and name of the class.
        state: attributes of the object.
    """

    path = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.state: Any = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> StoredObject:
        """Create the object; `pickle` does not call `__init__`."""
        new = super().__new__(cls)
        new.state = {}
        return new

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def plain(self) -> Any:
        """The plain value: the content of an omegaconf node, a namespace or a dictionary."""
        state = self.state if isinstance(self.state, Mapping) else {}
        if self.path.startswith("omegaconf."):
            return state.get("_content", state.get("_val"))
        return state if self.path.endswith("Namespace") else dict(self) or self


def stand_ins(path: Path, trust: Sequence[str] = ()) -> list[tuple[type, str]]:
    """A class for each object in a file that is not a tensor or a plain value, and its name.

    `torch.serialization.safe_globals` takes the list. It lacks objects that are neither harmless
    nor in the modules `trust`; torch then refuses the file.
    """
    try:
        names = set(get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):
        names = _names_in_old_format(path)
    accepted = (name for name in names if _HARMLESS.fullmatch(name) or is_trusted(name, trust))
    return [(_stand_in(name), name) for name in accepted]


def _stand_in(name: str) -> type:
    # torch fills no other dictionaries than these.
    if name.endswith(".AttributeDict"):
        return OrderedDict
    return type("Stored", (StoredObject,), {"path": name})


def _names_in_old_format(path: Path) -> set[str]:
    """The names of objects in a file of torch before version 1.6; empty for a damaged file."""
    names = set()
    with suppress(ValueError, OSError), path.open("rb") as file:
        # Magic number, version, system, content.
        for _ in range(4):
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    # Pickles of this protocol have the names of Python 2.
                    current = IMPORT_MAPPING.get(module, module), name
                    names.add(".".join(NAME_MAPPING.get((module, name), current)))
    return names
