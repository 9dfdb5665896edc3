"""The JSON Schema of `parity.json`, derived from the dataclasses that it is written from.

    python -m k25_validate.report_schema > docs/parity-report.schema.json

`docs/parity-report.schema.json` is this, published; a test compares them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from k25_validate.parity_report import SCHEMA_VERSION, ParityReport

Schema = dict[str, Any]

#: JSON has no infinity and no NaN.
_NUMBER: Schema = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
_PLAIN: Mapping[Any, Schema] = {
    float: _NUMBER,
    int: {"type": "integer"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}

#: What `report_to_dict` adds to the fields.
_ADDED: Mapping[str, Schema] = {
    "format": {"const": "k25-parity-report"},
    "schema_version": {"const": SCHEMA_VERSION},
    "passed": {"type": "boolean", "description": "The verdict: 0 or 1 as exit code."},
    "verdict": {"type": "string", "description": "The verdict in one sentence."},
}


def report_schema() -> Schema:
    """The schema, draft 2020-12. It allows no key that this version does not write."""
    definitions: dict[str, Schema] = {}
    report = _object(ParityReport, definitions)
    definitions["Check"]["properties"]["passed"] = {"type": "boolean"}
    definitions["Check"]["required"].append("passed")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "k25-export parity report",
        **report,
        "properties": {**_ADDED, **report["properties"]},
        "required": [*_ADDED, *report["required"]],
        "$defs": dict(sorted(definitions.items())),
    }


def _object(kind: type, definitions: dict[str, Schema]) -> Schema:
    """The schema of a dataclass; every field is written, so every field is required."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {
        "type": "object",
        "description": " ".join(inspect.cleandoc(kind.__doc__ or "").split()),
        "properties": {name: _schema(hints[name], definitions) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _schema(hint: Any, definitions: dict[str, Schema]) -> Schema:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    return dict(_PLAIN[hint])


if __name__ == "__main__":
    print(json.dumps(report_schema(), indent=2))
