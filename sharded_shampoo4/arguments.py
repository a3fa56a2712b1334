"""The options of Shampoo4 on command lines and in YAML files, for ``transformers.HfArgumentParser``."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any, get_args, get_origin

from .options import DEFAULTS, HELP, TYPES, Preset
from .presets import PRESET_HELP


def _field(name: str, kind: Any, help: str, default: Any) -> tuple[str, Any, Any]:
    # HfArgumentParser's formatter appends "(default: None)" to a help that does not mention %(default).
    metadata: dict[str, Any] = {"help": f"{help} (default: {default})%(default).0s"}
    if kind is bool:
        metadata |= {"nargs": "?", "const": True}  # --protect as well as --protect true
    if get_origin(kind) is tuple:
        whole = get_args(kind)[0] is int
        kind, metadata["metavar"] = (list[int], "STEPS") if whole else (list[float], "DECAY")
    return name, kind | None, field(default=None, metadata=metadata)


_Fields: Any = make_dataclass(
    "_Fields",
    [
        _field("preset", Preset, PRESET_HELP, None),
        *(_field(name, TYPES[name], HELP[name], default) for name, default in DEFAULTS.items()),
    ],
)


class Shampoo4Arguments(_Fields):  # type: ignore[misc]
    """A dataclass with a field for the preset and for every option of the preconditioner; None: not given.

    ::

        parser = HfArgumentParser((Shampoo4Arguments, TrainingArguments))
        options, training = parser.parse_args_into_dataclasses()
        optimizer = Shampoo4(model.named_parameters(), lr=training.learning_rate, **options.given())
    """

    _argument_group_name = "Shampoo4"  # of these flags in --help

    def given(self) -> dict[str, Any]:
        """Return the options that were given, by name: keyword arguments of ``Shampoo4`` and ``estimate_memory``.

        Those that were not given are left out, so that they do not take the place of a preset's.
        """
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
