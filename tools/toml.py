"""TOML text from flat tables: the standard library only reads it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def text(tables: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]], comment: str = "") -> str:
    """Tables of strings, numbers, truth values and lists of them, as TOML; None is left out.

    A sequence of tables becomes ``[[name]]``. comment: lines at the top.
    """
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    for name, content in tables.items():
        many = not isinstance(content, Mapping)
        for table in content if many else [content]:
            assert isinstance(table, Mapping)
            lines += ["", f"[[{name}]]" if many else f"[{name}]"]
            # JSON's strings, numbers and lists are TOML's too
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines).lstrip("\n") + "\n"
