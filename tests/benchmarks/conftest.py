"""The schemas of benchmarks/schemas/, and `validate(payload, kind)`, which raises where a result breaks them."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).parents[2] / "benchmarks" / "schemas"


@pytest.fixture(scope="session")
def schemas():
    return {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}


@pytest.fixture(scope="session")
def validate(schemas):
    registry = Registry().with_resources(
        (f"{name}.json", Resource.from_contents(schema)) for name, schema in schemas.items()
    )
    return lambda payload, kind: Draft202012Validator(schemas[kind], registry=registry).validate(payload)
