"""Configuration: YAML files merged left to right, then `key=value` overrides, into one frozen strict model.

Files are merged key by key (mappings merge, everything else replaces), so an overlay names only what it
changes. Every problem of the merged whole is reported at once, each with its key, its value, the rule and
the name that was probably meant. YAML is read with a safe loader that refuses repeated keys and reads
`1e-4` as a number (YAML 1.2 and everybody's intention; YAML 1.1 calls it a string).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from pipeline.errors import ConfigError

SHIPPED = Path(__file__).parent / "configs"  # the configurations that come with the package: a checkout's configs/


class StrictModel(BaseModel):
    """Base of every configuration model: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


M = TypeVar("M", bound=StrictModel)


_TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2 floats, days as text, and without repeated keys."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice (lines {seen[key]} and {line})", key_node.start_mark
            )
        seen[key] = line
    return {str(k): v for k, v in loader.construct_mapping(node, deep=True).items()}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
    ),
    list("-+0123456789."),
)


def load_config(model: type[M], files: Sequence[str], overrides: Sequence[str] = ()) -> M:
    """Read, merge and validate; raises ConfigError that lists every problem.

    A file configs/... that is not here is the one of that name that comes with the package.
    """
    merged: dict[str, Any] = {}
    for name in files:
        path = Path(name)
        if path.parts[:1] == (SHIPPED.name,) and not path.exists():
            path = SHIPPED.joinpath(*path.parts[1:])
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            siblings = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, [p.name for p in siblings], n=1)
            hint = f"; did you mean {Path(name).with_name(near[0])}?" if near else ""
            raise ConfigError(
                f"There is no configuration file {name}{hint}",
                rule="arguments are YAML files, then key=value overrides",
                next_step="name an existing file, or write key=value to set a single key; `latentloom configs list` "
                "and `latentloom configs copy NAME` have those that come with the package",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The configuration file {name} cannot be read: {error}") from None
        merged = merge(merged, _with_environment(_mapping(text, f"file {name}"), "", name))
    for override in overrides:
        key, equals, value = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"The override {override!r} cannot be understood",
                rule="an override is dotted.key=value",
                next_step="for example train.batch_size=64",
            )
        nested: Any = _override_value(value, f"override {override!r}")
        for part in reversed(parts):
            nested = {part: nested}
        merged = merge(merged, nested)
    return validate(model, merged)


_VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
# Variables that hold secrets, by their names; TOKENIZERS_PARALLELISM is none.
SECRET_NAME = re.compile(r"(?i)(?:password|passwd|secret|credential|token$|_token_|api_?key|access_key$)")


def _with_environment(data: Any, key: str, file: str) -> Any:
    """Values of a file with ${env:NAME} replaced; one that is nothing else is read as that of an override is.

    ConfigError for a variable that is not set, or that is a secret by its name: values are stored and shown.
    """
    if isinstance(data, Mapping):
        return {n: _with_environment(value, f"{key}.{n}" if key else str(n), file) for n, value in data.items()}
    if isinstance(data, list):
        return [_with_environment(value, key, file) for value in data]
    if not isinstance(data, str):
        return data

    def value_of(found: re.Match[str]) -> str:
        name = found[1]
        if SECRET_NAME.search(name):
            rule = "configurations are stored beside the data and shown in many places"
            step = "give credentials as the store's own environment variables, files or roles"
            raise ConfigError(
                f"{file} puts a secret into a value", key=key, value=found[0], rule=rule, next_step=step
            )
        if name not in os.environ:
            step = f"set {name} in the environment of the job, or write the value"
            rule = "${env:NAME} is the value of the environment variable NAME"
            raise ConfigError(
                f"{file} needs a variable that is not set", key=key, value=found[0], rule=rule, next_step=step
            )
        return os.environ[name]

    text = _VARIABLE.sub(value_of, data)
    return _override_value(text, f"{file}, {key}") if _VARIABLE.fullmatch(data) else text


def _override_value(text: str, origin: str) -> Any:
    """What stands behind the = of an override: a number, list or the like where all of it is one, else its very text.

    YAML would end it at " #", and has a meaning for a first *, & or @ that nobody has who writes a path or a prompt.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        if any(text.lstrip().startswith(first) and last not in text for first, last in ("[]", "{}")):
            _mapping(f"value: {text}", origin)  # never closed: says so
        return text
    if node is None or node.start_mark.index or text[node.end_mark.index :].strip():
        return text
    if isinstance(node, yaml.ScalarNode) and (node.style in ("|", ">") or (not node.style and node.tag == _TEXT)):
        return text
    if node.tag.startswith("!") or (isinstance(node, yaml.CollectionNode) and not node.flow_style):
        return text
    return _mapping(f"value: {text}", origin).get("value")


def validate(model: type[M], data: Mapping[str, Any]) -> M:
    """Build `model` from plain data; raises ConfigError that lists every problem with its likely remedy."""
    _refuse_passwords(data, "")
    try:
        # JSON mode: strict about types, yet a YAML list may fill a tuple.
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        described = [_describe(model, detail, data) for detail in error.errors()]
        # A value that fits no member of a plain union is one problem, though every member complains.
        problems = list(dict(reversed(described)).values())[::-1]
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(
            f"The configuration has {count}:\n" + "\n".join(f"  - {p}" for p in problems),
            next_step="correct the named keys; --help prints every key with its meaning",
        ) from None
    except TypeError as error:
        raise ConfigError(f"The configuration holds a value of an unknown type: {error}") from None


_PASSWORD = re.compile(
    r"(?:^|::)[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@\s:]*:(?!\d+/)\S+|(?<=http://)[^/@\s]+|(?<=https://)[^/@\s]+)@"
)
# Presigned and token-bearing URIs: whoever reads one may do what it allows.
_SIGNED = re.compile(
    r"(://\S*?[?&](?:[\w.-]*(?:signature|token|secret|passw(?:or)?d|api_?key)|sig)=)[^\s'\"]+", re.IGNORECASE
)


def _refuse_passwords(data: Any, key: str) -> None:
    """ConfigError for a URI with a password or signature: configurations are stored with the data, logged and shown.

    Only a tracking store's may have one, for databases take it in no other way; it is removed wherever it is shown.
    """
    if isinstance(data, Mapping):
        for name, value in data.items():
            _refuse_passwords(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for value in data:
            _refuse_passwords(value, key)
    elif isinstance(data, str) and key != "tracking.uri" and (_PASSWORD.search(data) or _SIGNED.search(data)):
        raise ConfigError(
            "The configuration holds a password",
            key=key,
            value=_SIGNED.sub(r"\1***", re.sub(r"://.*@", "://***@", data)),
            rule="a URI names a place; configurations are stored beside the data and shown in many places",
            next_step="take it out, and give credentials as the store's own environment variables, files or roles",
        )


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overlaid by `top`: mappings merge key by key, everything else is replaced."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        both_maps = isinstance(old, Mapping) and isinstance(value, Mapping)
        out[key] = merge(old, value) if both_maps else value  # type: ignore[arg-type]
    return out


def dump_yaml(model: StrictModel) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal model."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def config_digest(model: StrictModel) -> str:
    """Hex blake2b-128 of the canonical JSON of a model."""
    text = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"The configuration {origin} is no valid YAML{where}: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"The configuration {origin} holds a {type(data).__name__}",
            rule="a configuration is a mapping of keys to values",
        )
    return data


def _describe(model: type[BaseModel], detail: ErrorDetails, data: Mapping[str, Any]) -> tuple[str, str]:
    """(the key as the user wrote it, the whole message)."""
    # pydantic names the chosen member of a tagged union inside `loc`; a user never wrote it.
    loc = [str(p) for p in _user_loc(detail["loc"], data)]
    key = ".".join(loc)
    if detail["type"] == "extra_forbidden":
        return key, f"{key} = {_clip(detail['input'])}: there is no such key{_hint(model, loc)}"
    if detail["type"] == "missing":
        return key, f"{key}: this key is required and has no default"
    if detail["type"] == "union_tag_not_found":
        return f"{key}.kind", f"{key}.kind: this key is required and has no default"
    rule = detail["msg"].removeprefix("Value error, ")
    near = ""
    expected = detail.get("ctx", {}).get("expected") or detail.get("ctx", {}).get("expected_tags")
    if expected and isinstance(detail["input"], str | dict):
        given = detail["input"] if isinstance(detail["input"], str) else detail.get("ctx", {}).get("tag", "")
        match = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", str(expected)), n=1)
        near = f"; did you mean {match[0]}?" if match else ""
    return key, f"{key or 'configuration'} = {_clip(detail['input'])}: {rule[:1].lower() + rule[1:]}{near}"


def _user_loc(loc: Sequence[int | str], data: Any) -> Iterator[int | str]:
    """The parts of a pydantic location that exist in, or could be added to, the user's own data."""
    for i, part in enumerate(loc):
        if isinstance(data, Mapping) and part not in data and i < len(loc) - 1:
            continue  # a union tag
        if not isinstance(data, (Mapping, list)):
            return  # inside a value of the user's: what follows names members of a union
        yield part
        if isinstance(data, Mapping):
            data = data.get(str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]


def _clip(value: object) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."


def renamed_from(name: str) -> dict[str, JsonValue]:
    """What a field says of the name that it had before: who uses that is told the new one."""
    return {"renamed_from": name}


def _hint(model: type[BaseModel], loc: Sequence[str]) -> str:
    """Which key an unknown one stands for: its new name, else the nearest among its neighbours, else in the tree.

    Of a key that another variant of its section has, which one that is.
    """
    known = []
    for key, _, info, condition in _tree(model, ""):
        if key == ".".join(loc) and condition:
            return f"; it exists where {key.rpartition('.')[0]}.{condition}"
        known.append(key)
        section, _, _ = key.rpartition(".")
        extra = info.json_schema_extra
        if isinstance(extra, dict) and f"{section}.{extra.get('renamed_from')}".lstrip(".") == ".".join(loc):
            return f"; it is called {key} now"
    prefix = ".".join(loc[:-1])
    near_by = [k for k in known if k.rpartition(".")[0] == prefix]
    last = {k.rpartition(".")[2]: k for k in near_by}
    match = difflib.get_close_matches(loc[-1], list(last), n=1)
    if match:
        return f"; did you mean {last[match[0]]}?"
    anywhere = {k.rpartition(".")[2]: k for k in known}
    match = difflib.get_close_matches(loc[-1], list(anywhere), n=1, cutoff=0.75)
    return f"; did you mean {anywhere[match[0]]}?" if match else ""


def field_tree(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Every key of a model, depth first: (dotted key, type as text, field); a union lists all its members."""
    for key, kind, info, _ in _tree(model, prefix):
        yield key, kind, info


def _tree(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, FieldInfo, str]]:
    """Like `field_tree`, with the condition under which a key exists ("" or "kind = x, y") as fourth."""
    for name, info in model.model_fields.items():
        key = prefix + name
        yield key, _type_text(info.annotation), info, ""
        children = _submodels(info.annotation)
        if len(children) == 1:
            yield from _tree(children[0], key + ".")
        elif children:
            yield from _union_tree(children, key + ".")


def _union_tree(members: Sequence[type[BaseModel]], prefix: str) -> Iterator[tuple[str, str, FieldInfo, str]]:
    """The keys of a tagged union: the tag with all its values first, then each other key once."""
    keys: dict[str, tuple[str, FieldInfo, list[str]]] = {}
    for member in members:
        tag = _type_text(member.model_fields["kind"].annotation) if "kind" in member.model_fields else member.__name__
        for key, kind, info, _ in _tree(member, prefix):
            keys.setdefault(key, (kind, info, []))[2].append(tag)
    for key, (kind, info, tags) in keys.items():
        if key == prefix + "kind":
            yield key, " | ".join(tags), info, ""
        else:
            yield key, kind, info, "" if len(tags) == len(members) else f"kind = {', '.join(tags)}"


def _submodels(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in _submodels(a)]


def _type_text(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(args[0])
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type_text(a) for a in args))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is tuple:
        return f"list of {_type_text(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(map(_type_text, args))}]"
    if origin in (dict, Mapping):
        return "mapping"
    if annotation is type(None):
        return "null"
    return {str: "text", int: "whole number", float: "number", bool: "true | false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def help_text(model: type[BaseModel]) -> str:
    """The field tree with types, defaults, conditions and descriptions, for --help."""
    lines: list[str] = []
    for key, kind, info, condition in _tree(model, ""):
        indent = "  " * key.count(".")
        default = ""
        if info.is_required():
            default = "required"
        elif not (kind == "section" or info.default is PydanticUndefined or isinstance(info.default, BaseModel)):
            plain = info.default
            if isinstance(plain, tuple):
                plain = [v.model_dump() if isinstance(v, BaseModel) else v for v in plain]
            default = f"default {_clip(plain)}"
        notes = ["" if kind == "section" else kind, default, f"only {condition}" if condition else ""]
        shown = "; ".join(n for n in notes if n)
        lines.append(f"{indent}{key}" + (f"  ({shown})" if shown else ""))
        if info.description:
            lines.append(f"{indent}    {info.description}")
    return "\n".join(lines)


def installed_plugin(group: str, name: str, *, key: str, others: Sequence[str] = ()) -> metadata.EntryPoint:
    """The entry point of a plug-in, not loaded; ConfigError when no installed package has it.

    `key` is the setting that names it; `others` are values which that setting takes besides.
    """
    points = {point.name: point for point in metadata.entry_points(group=group)}
    if name not in points:
        near = difflib.get_close_matches(name, [*points, *others], n=1)
        offered = f"an installed entry point of {group}: {', '.join(sorted(points)) or 'there is none'}"
        raise ConfigError(
            "No installed package offers this plug-in",
            key=key,
            value=name,
            rule=", or ".join([*others, offered]),
            next_step=f"did you mean {near[0]}?" if near else "install the package that offers it, on every node",
        )
    return points[name]


def check_installed() -> None:
    """Raise ConfigError that names every installed package whose version is outside the range this package needs.

    Nothing happens where its own metadata is not installed, as in a bare checkout, nor for what is missing: whoever
    imports that says so.
    """
    try:
        needed = [line for line in metadata.requires("latentloom") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, needed):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, version))
    if wrong:
        raise ConfigError(
            "This environment holds packages of versions that were never tried",
            key=", ".join(requirement.name for requirement, _ in wrong),
            value=", ".join(version for _, version in wrong),
            rule=", ".join(f"{requirement.name}{requirement.specifier}" for requirement, _ in wrong),
            next_step="pip install latentloom in an environment of its own, or "
            + "pip install "
            + " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement, _ in wrong),
        )


def need_package(name: str, extra: str) -> None:
    """Raise ConfigError unless a package that only an extra brings is installed; it is not imported."""
    if find_spec(name) is None:
        raise ConfigError(
            f"The package {name} is not installed",
            key="extra",
            value=extra,
            rule=f"what needs {name} comes with the extra {extra}",
            next_step=f"pip install 'latentloom[{extra}]', on every node",
        )
