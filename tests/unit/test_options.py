"""The options' one place: the signature, the docstring, presets and command lines follow it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.arguments import Shampoo4Arguments
from sharded_shampoo4.options import DEFAULTS, HELP, METHODS, TYPES, UNUSED_BY, PreconditionerOptions
from sharded_shampoo4.presets import PRESETS

ROOT = Path(__file__).parents[2]
CHANGED: dict[str, Any] = {  # another value for every option
    "precondition": False,
    "method": "shampoo",
    "bits": 4,
    "quantize": "preconditioner",
    "codebook": "normal",
    "quant_block_size": 32,
    "scale_dtype": "float32",
    "root": "implicit",
    "protect": True,
    "min_quant_numel": 0,
    "shampoo_beta": 0.95,
    "matrix_eps": 1e-4,
    "statistics_interval": 7,
    "root_interval": 700,
    "interval_warmup": False,
    "refresh": "staggered",
    "rectify_steps": (2, 3),
    "refresh_iterations": 2,
    "refresh_dtype": "float64",
    "max_preconditioner_dim": 50,
    "max_aspect": 0,
    "batch_dims": 1,
    "split_rows": (2,),
    "split": "remainder",
    "grafting": "none",
    "soap_betas": (0.95, 0.99),
    "soap_eps": 1e-6,
    "newton_schulz_steps": 5,
    "momentum_dtype": "int8",
    "second_moment_dtype": "float32",
    "max_failures": 3,
    "matmul_dtype": "bfloat16",
    "exchange_dtype": "bfloat16",
    "scratch_mib": 64,
}


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(8, 6))


# Options whose default depends on the method or the bits.
OF_SHAMPOO: dict[str, Any] = {
    **DEFAULTS,
    **METHODS["shampoo"],
    "method": "shampoo",
    "statistics_interval": 100,
    "root_interval": 500,
}
LOW: dict[str, Any] = {"rectify_steps": (1, 1), "protect": True}


def resolved(optimizer: Shampoo4, group: int = -1) -> dict[str, Any]:
    """The preconditioner's options in a group, and nothing of a preset."""
    found = optimizer.param_groups[group]
    assert "preset" not in found
    return {name: found[name] for name in DEFAULTS}


def parsed(*flags: str) -> dict[str, Any]:
    parser = HfArgumentParser(Shampoo4Arguments)
    (arguments,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    return arguments.given()


# -- one place ---------------------------------------------------------------------------------------------------------


def test_the_signature_has_every_option_with_its_type_and_default() -> None:
    parameters, types = inspect.signature(Shampoo4).parameters, get_type_hints(Shampoo4.__init__)
    intervals = ("statistics_interval", "root_interval")  # None: total_steps may choose them
    for name, default in DEFAULTS.items():
        if name in intervals:
            assert parameters[name].default is None and types[name] == TYPES[name] | None
        else:
            assert parameters[name].default == default and types[name] == TYPES[name]
    assert set(CHANGED) == set(DEFAULTS) and all(CHANGED[name] != DEFAULTS[name] for name in DEFAULTS)


@pytest.mark.parametrize("chosen", [{"preset": "compact"}, {"method": "shampoo"}, {"preset": "compact", "bits": 3}])
def test_a_call_that_gives_every_option_follows_its_preset_and_method(chosen: dict[str, Any]) -> None:
    """Command lines made of the signature, such as LightningCLI's, cannot tell what was given."""

    def options_of(**given: Any) -> dict[str, Any]:
        group = Shampoo4([nn.Parameter(torch.zeros(4, 4))], **given).param_groups[0]
        return {name: group[name] for name in DEFAULTS}

    parameters = inspect.signature(Shampoo4).parameters.values()
    every = {p.name: p.default for p in parameters if p.default is not p.empty} | chosen
    assert options_of(**every) == options_of(**chosen)
    del every["process_group"]
    assert options_of(**every)["momentum_dtype"] == DEFAULTS["momentum_dtype"], "in other calls what is given wins"
    assert options_of(**every)["bits"] == every["bits"]


def written(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f'"{value}"' if isinstance(value, str) else repr(value)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_docstring_says_of_every_option_what_its_help_says(name: str) -> None:
    choices = get_args(TYPES[name]) if get_origin(TYPES[name]) is Literal else ()
    values = f" One of {', '.join(map(written, choices))}." if choices else ""
    expected = f" {name}: {HELP[name]}{values} (default: {written(DEFAULTS[name])}) "
    assert expected in re.sub(r"\s+", " ", Shampoo4.__doc__ or "")


@pytest.mark.parametrize("name", DEFAULTS)
def test_help_is_made_of_sentences_that_argparse_can_print(name: str) -> None:
    assert HELP[name][0].isupper() or HELP[name].startswith("QR")
    assert HELP[name].endswith(".") and "%" not in HELP[name]


# -- pages -------------------------------------------------------------------------------------------------------------

EVERYDAY = (
    "lr", "weight_decay", "base", "preset", "method", "bits", "statistics_interval", "refresh",
    "max_preconditioner_dim", "precondition",
)  # fmt: skip


def rows_of(page: str) -> dict[str, tuple[str, str]]:
    """Of each option in a page's tables of options its default and the row, by name."""
    tables = re.findall(r"^\| option.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    found: dict[str, tuple[str, str]] = {}
    for row in "".join(tables).splitlines():
        first, second = (cell.strip() for cell in row.split("|")[1:3])
        names = re.findall(r"`(\w+)`", first)
        inside = re.findall(r"`\w+` \((.*?)\)(?:,|$)", first)
        for name, default in zip(names, inside or second.split(", "), strict=True):
            assert name not in found, f"{name} stands in {page} twice"
            found[name] = default, row
    return found


def default_of(name: str) -> Any:
    return DEFAULTS.get(name, inspect.signature(Shampoo4).parameters[name].default)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", EVERYDAY),
        (
            "launch/hyperparameters.md",
            ("lr", "weight_decay", "base", "preset", "total_steps", "process_group", *DEFAULTS),
        ),
    ],
)
def test_pages_tell_every_option_its_default_and_its_choices(page: str, names: tuple[str, ...]) -> None:
    rows = rows_of(page)
    assert set(rows) == set(names)
    for name, (default, row) in rows.items():
        assert default.strip("`") == written(default_of(name)), name
        if page != "README.md" and get_origin(TYPES.get(name)) is Literal:
            assert all(written(choice) in row for choice in get_args(TYPES[name])), name


# -- presets -----------------------------------------------------------------------------------------------------------


def added(**options: Any) -> Shampoo4:
    optimizer = Shampoo4([matrix()])
    optimizer.add_param_group({"params": [matrix()], **options})
    return optimizer


WAYS: dict[str, Callable[..., Shampoo4]] = {
    "call": lambda **options: Shampoo4([matrix()], **options),
    "group": lambda **options: Shampoo4([{"params": [matrix()], **options}]),
    "later group": added,
    "JSON": lambda **options: Shampoo4([matrix()], **json.loads(json.dumps(options))),
    "command line": lambda **options: Shampoo4([matrix()], **parsed(*flags(options))),
}


def flags(options: dict[str, Any]) -> list[str]:
    values = {name: value if isinstance(value, tuple) else [value] for name, value in options.items()}
    return [text for name, value in values.items() for text in (f"--{name}", *map(str, value))]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_preset_is_its_settings_and_an_option_beside_it_wins(way: str, preset: str) -> None:
    """Also an option that is given the value it has by default."""
    settings = PRESETS[preset]
    defaults = OF_SHAMPOO if settings["method"] == "shampoo" else {**DEFAULTS, **LOW}
    assert resolved(WAYS[way](preset=preset)) == {**defaults, **settings}
    for name in set(settings) - {"quantize", "method"}:  # which "implicit" roots need as they are
        for value in (CHANGED[name], DEFAULTS[name]):
            found = resolved(WAYS[way](preset=preset, **{name: value}))
            begun = DEFAULTS if (preset, name, value) == ("compact", "bits", 8) else defaults
            assert found == {**begun, **settings, name: value}


def test_a_group_s_preset_wins_over_the_call_s_options() -> None:
    own = [{"preset": "shampoo-compact", "bits": 3}, {"preset": "compact"}, {"split": "even"}]
    groups = [{"params": [matrix()], **options} for options in own]
    optimizer = Shampoo4(groups, preset="paper", rectify_steps=(2, 2), quant_block_size=32)
    call = {**OF_SHAMPOO, **PRESETS["paper"], "rectify_steps": (2, 2), "quant_block_size": 32}
    assert resolved(optimizer, 0) == {**call, **PRESETS["shampoo-compact"], "bits": 3}
    of_soap = {name: DEFAULTS[name] for name in (*METHODS["shampoo"], "statistics_interval", "root_interval", "root")}
    assert resolved(optimizer, 1) == {**call, **of_soap, **LOW, **PRESETS["compact"]}
    assert resolved(optimizer, 2) == {**call, "split": "even"}


def test_states_and_estimates_know_what_a_preset_means() -> None:
    optimizer, same = Shampoo4([matrix()], preset="compact"), Shampoo4([matrix()], **PRESETS["compact"])
    assert optimizer.state_dict()["param_groups"] == same.state_dict()["param_groups"]
    same.load_state_dict(optimizer.state_dict())
    shapes = {"w": (200, 300)}
    assert estimate_memory(shapes, preset="compact") == estimate_memory(shapes, **PRESETS["compact"])
    assert estimate_memory(shapes, preset="compact") != estimate_memory(shapes)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("compcat", "preset must be one of 'paper', 'compact', 'shampoo-compact', got 'compcat'"),
        ("auto", 'preset is "auto"'),
        (4, "got 4"),
    ],
)
def test_a_preset_that_is_not_there(preset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo4([matrix()], preset=preset)
    with pytest.raises(ValueError, match=message):
        estimate_memory({"w": (8, 6)}, preset=preset)
    with pytest.raises(ValueError, match=f"param group 0: .*{message}"):
        Shampoo4([{"params": [matrix()], "preset": preset}])


def test_a_misspelt_preset_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'prest'.*; did you mean 'preset'"):
        Shampoo4([matrix()], prest="compact")
    with pytest.raises(TypeError, match="unknown option 'presets' in param group 0; did you mean 'preset'"):
        Shampoo4([{"params": [matrix()], "presets": "compact"}])


@pytest.mark.parametrize(
    ("preset", "method", "others"),
    [
        ("compact", "shampoo", "'paper' or 'shampoo-compact'"),
        ("paper", "soap", "'compact'"),
        ("shampoo-compact", "SOAP", "'compact'"),
    ],
)
def test_a_preset_is_for_its_own_method(preset: str, method: str, others: str) -> None:
    own = PRESETS[preset]["method"]
    message = f"preset='{preset}' is for method='{own}', got method='{method.lower()}': .* give preset={others}"
    for make in (Shampoo4, lambda given, **options: Shampoo4([{"params": given, **options}])):
        with pytest.raises(ValueError, match=message):
            make([matrix()], preset=preset, method=method)
        assert resolved(make([matrix()], preset=preset, method=own)) == resolved(Shampoo4([matrix()], preset=preset))
    with pytest.raises(ValueError, match=message):
        estimate_memory({"w": (8, 6)}, preset=preset, method=method)
    with pytest.raises(ValueError, match="method must be one of"):
        Shampoo4([matrix()], preset=preset, method="adam")
    group = {"params": [matrix()], "preset": preset}
    assert Shampoo4([group], method="shampoo" if own == "soap" else "soap").param_groups[0]["method"] == own


def test_the_settings_of_presets() -> None:
    assert Shampoo4.paper_settings() == PRESETS["paper"]
    for preset, settings in PRESETS.items():
        assert settings.keys() <= DEFAULTS.keys() and "method" in settings, preset
        assert resolved(Shampoo4([matrix()], **settings)) == resolved(Shampoo4([matrix()], preset=preset))


# -- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_method_brings_its_defaults_and_an_option_beside_it_wins(way: str) -> None:
    assert resolved(WAYS[way]()) == resolved(WAYS[way](method="soap")) == {**DEFAULTS, **METHODS["soap"]}
    assert resolved(WAYS[way](total_steps=20_000) if way == "call" else WAYS[way]()) == DEFAULTS
    given = {"bits": 4, "shampoo_beta": 0.95}
    assert resolved(WAYS[way](**given)) == {**DEFAULTS, **given, **LOW}
    assert resolved(WAYS[way](method="shampoo")) == OF_SHAMPOO
    given = {"method": "shampoo", "bits": 8, "shampoo_beta": DEFAULTS["shampoo_beta"], "statistics_interval": 20}
    assert resolved(WAYS[way](**given)) == {**OF_SHAMPOO, **given}


def test_groups_of_several_methods() -> None:
    """A group with another method begins with that method's defaults, whatever the call gives for its own."""
    groups = [{"params": [matrix()], "method": "soap"}, {"params": [matrix()]}]
    own = {"root": "implicit", "root_interval": 50, "protect": True}
    optimizer = Shampoo4(groups, method="shampoo", split="remainder", **own)
    assert resolved(optimizer, 0) == {**DEFAULTS, "split": "remainder"}
    assert resolved(optimizer, 1) == {**OF_SHAMPOO, "split": "remainder", **own, "statistics_interval": 50}
    groups = [{"params": [matrix()], "method": "shampoo", "bits": 3}, {"params": [matrix()]}]
    optimizer = Shampoo4(groups, soap_eps=1e-3, bits=4)
    assert resolved(optimizer, 0) == {**OF_SHAMPOO, "bits": 3}
    assert resolved(optimizer, 1) == {**DEFAULTS, "soap_eps": 1e-3, "bits": 4, **LOW}
    groups = [{"params": [matrix()], "preset": "compact"}, {"params": [matrix()], "preset": "paper"}]
    optimizer = Shampoo4(groups, preset="shampoo-compact")
    assert resolved(optimizer, 0) == {**DEFAULTS, "codebook": "normal", **LOW, **PRESETS["compact"]}


def test_a_page_tells_the_defaults_of_a_method() -> None:
    page = (ROOT / "launch/hyperparameters.md").read_text()
    table = page[page.index("| with shampoo |") :].partition("\n\n")[0]
    rows = {name: default.strip(" `") for name, default in re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)}
    changed = {name: value for name, value in OF_SHAMPOO.items() if value != DEFAULTS[name] and name != "method"}
    assert rows == {name: written(value) for name, value in changed.items()}


def test_the_docstring_tells_the_defaults_of_shampoo() -> None:
    doc = re.sub(r"\s+", " ", Shampoo4.__doc__ or "")
    (listed,) = re.findall(r"Other defaults hold: (.+?)\. ", doc)
    call = ast.parse(f"dict({listed.replace(' and ', ', ')})", mode="eval").body
    assert isinstance(call, ast.Call) and not call.args
    stated = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert stated == {**METHODS["shampoo"], "statistics_interval": 100, "root_interval": 500}
    assert resolved(Shampoo4([matrix()], method="shampoo")) == {**DEFAULTS, **stated, "method": "shampoo"}
    assert all(stated[name] != DEFAULTS[name] for name in METHODS["shampoo"]) and METHODS["soap"] == {}


def test_the_bits_of_a_group_decide_whether_its_bases_are_rectified() -> None:
    own = [{"bits": 4}, {}, {"rectify_steps": (2, 2)}]
    groups = [{"params": [matrix()], **options} for options in own]
    optimizer = Shampoo4(groups, method="soap")
    assert [group["rectify_steps"] for group in optimizer.param_groups] == [(1, 1), (0, 0), (2, 2)]


@pytest.mark.parametrize("method", UNUSED_BY)
def test_an_option_of_the_other_method_is_an_error(method: str) -> None:
    for name in UNUSED_BY[method]:
        with pytest.raises(ValueError, match=rf"{name}=.* is for method=.*, got method='{method}'"):
            Shampoo4([matrix()], method=method, **{name: CHANGED[name]})


# -- command lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_can_be_given_on_a_command_line(name: str) -> None:
    beside = {"method": "shampoo"} if name in UNUSED_BY["soap"] else {"bits": 4} if name == "protect" else {}
    given = parsed(*flags({**beside, name: CHANGED[name]}))
    expected = dataclasses.replace(PreconditionerOptions(), **beside, **{name: CHANGED[name]})
    assert PreconditionerOptions(**given) == expected != PreconditionerOptions()
    assert parsed() == {}


def test_a_flag_without_a_value_is_true() -> None:
    assert parsed("--protect", "--interval_warmup", "false") == {"protect": True, "interval_warmup": False}


def test_help_names_every_option_s_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    HfArgumentParser(Shampoo4Arguments).print_help()
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, default in DEFAULTS.items():
        assert f"{HELP[name]} (default: {default})" in printed
    assert printed.count("(default: ") == len(DEFAULTS) + 1  # and the preset's
