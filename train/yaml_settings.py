"""Read YAML as its version 1.2 has it, in which `no` and `off` are words and only `true` and `false` are booleans."""

import re
from typing import Any, get_args

import yaml

# PyYAML reads version 1.1: `no` is false there, `1e-4` a word, `010` eight, `1:30` ninety and `2024-01-01` a date. So
# settings that take words (`training.eval_strategy: no`) would get booleans, and rates words.
KINDS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)|(?:0|[1-9][0-9]*)\.[0-9]*)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}
WORDS = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


for _kind, _pattern in KINDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Construct a mapping, in which a key that comes twice is an error: one of its values would be lost."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """Return what a YAML text says, or raise `yaml.YAMLError` or another `ValueError`."""
    return yaml.load(text, _Loader)  # noqa: S506 - it is a SafeLoader


def as_booleans(values: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """
    Return values with `yes`, `no`, `on` and `off` as booleans, in the fields that take booleans and no words.

    Args:
        values: by name of the field.
        hints: the type of each field.
    """
    return {
        name: WORDS.get(value.lower(), value) if isinstance(value, str) and _takes_booleans(hints.get(name)) else value
        for name, value in values.items()
    }


def _takes_booleans(hint: Any) -> bool:
    kinds = get_args(hint) or (hint,)
    return bool in kinds and str not in kinds
