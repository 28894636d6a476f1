"""Settings as text: YAML files, ``--set key=value``, errors that name the key, and ``--help``."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from brainray.config import SEARCH_KINDS, AugmentConfig, Config
from brainray.errors import ConfigError
from brainray.redaction import redacted

_CLASS_MAP = "classes.map."
_MAX_CONFIG_BYTES = 1_000_000
_MAX_PROBLEMS = 10  # in one error

_SPACE = "tune.space."
_SPACE_KEY = re.compile(rf"(?P<setting>.+)\.(?P<kind>{'|'.join(SEARCH_KINDS)})")


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or the defaults), apply ``key=value`` overrides, and validate.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, or a value out of range.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any], *, is_saved: bool = False) -> Config:
    """Validate a plain tree, as read from YAML.

    ``is_saved``: brainray has saved it. Settings that an earlier version had are then ignored.
    """
    try:
        return Config.model_validate(tree, extra="ignore" if is_saved else None)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def parse_saved(content: bytes, where: str) -> Config:
    """The config in a file that brainray has saved; ``where`` names the file in errors."""
    tree = parse_yaml(content, where)
    try:
        return parse_config(tree, is_saved=True)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def flatten(
    settings: BaseModel | Mapping[str, Any],
) -> dict[str, str | int | float | bool]:
    """``{"train.num_epochs": 20, ...}``; unset values are omitted, sequences become text."""
    flat: dict[str, str | int | float | bool] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(value, (list, tuple)):
            flat[prefix] = ",".join(str(item) for item in value)
        elif value is not None:
            flat[prefix] = value

    visit("", settings if isinstance(settings, Mapping) else settings.model_dump())
    return flat


def parse_yaml(content: bytes, where: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``where`` names the file in errors.

    Raises:
        ConfigError: it is not valid YAML, or not a mapping.
    """
    if len(content) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"{where} is larger than {_MAX_CONFIG_BYTES} bytes: not a config file")
    try:
        tree = yaml.load(content.decode(), _PlainLoader)
    except Exception as error:  # PyYAML raises nearly anything on invalid dates and numbers
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {_shortened(reason)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must contain a mapping of keys, not a {type(tree).__name__}")
    return tree


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only: SafeLoader rejects Python object tags, this class also aliases.

    A few lines of nested aliases can expand to more values than fit in memory. Scalars other than
    null are text, to which their setting gives a type, so that the names ``1.10`` and ``no`` stay
    as written.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported", problem_mark=mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read keys as text, as ``--set`` does, and reject duplicate ones, of which the last would
        silently win.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_implicit_resolvers = {}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)


def to_yaml(config: Config) -> str:
    """The resolved configuration without secrets, as a file that ``--config`` can read.

    Strengths set by an augmentation policy are omitted, so that changing the policy changes them.
    """
    tree = config.without_secrets().model_dump(mode="json")
    for section in (
        tree["augment"],
        tree["augment_unlabelled"],
        tree["self_supervision"]["augment"],
    ):
        own = AugmentConfig(policy=section["policy"]).model_dump(mode="json")
        for key in [key for key, value in section.items() if key != "policy" and value == own[key]]:
            del section[key]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no such config file: {path}; the bundled ones are in configs/")
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(content, where=str(path))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"--set {override!r}: write dotted.key=value, without spaces or in quotes"
        )
    *parents, leaf = key.strip().split(".")
    if key.startswith(_CLASS_MAP):  # class names may contain '.' and '='
        key, _, text = override.rpartition("=")
        parents, leaf = ["classes", "map"], key.removeprefix(_CLASS_MAP).strip()
    if key.startswith(_SPACE):  # contains the key of a setting, which itself has dots
        setting = key.strip().removeprefix(_SPACE)
        space_key = _SPACE_KEY.fullmatch(setting)
        parents, leaf = ["tune", "space"], setting
        if space_key is not None:
            parents, leaf = [*parents, space_key["setting"]], space_key["kind"]
    try:
        # In a name or path, YAML would read "#" as a comment and ": " as a mapping.
        has_comment = " #" in text or text.lstrip().startswith("#")
        value = text if has_comment else yaml.load(text, _PlainLoader)
        if isinstance(value, dict) and not text.lstrip().startswith("{"):
            value = text
    except Exception:  # as with files, PyYAML raises nearly anything
        value = text
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # also where a file leaves it empty
            node[parent] = {}
        child = node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


_LIST, _SECTION = "write a list, such as [a, b]", "this is a section: set the keys within it"
_MESSAGES = {
    "tuple_type": _LIST,
    "list_type": _LIST,
    "dict_type": _SECTION,
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
}
"""For types of errors that pydantic describes in terms of Python."""


def _explain(error: ValidationError) -> str:
    """All problems on one line, each with its dotted key and, for a typo, the nearest key."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}{did_you_mean([*map(str, item['loc'])])}")
        else:
            message = _MESSAGES.get(item["type"], item["msg"].removeprefix("Value error, "))
            key = key.removesuffix(".[key]")
            if item["type"] != "value_error":
                message += f", not {_shortened(redacted(repr(item['input'])), 100)}"
            problems.append(f"{key}: {message}" if key else message)
    shown = [_shortened(" ".join(problem.split())) for problem in problems[:_MAX_PROBLEMS]]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _shortened(text: str, limit: int = 500) -> str:
    """The text, with its middle cut out if it is too long for one line."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def did_you_mean(parts: Sequence[str]) -> str:
    """What to write instead of an unknown key, or within it if it is that of a section; for errors.

    ``parts``: of the key, without its dots.
    """
    fields = _fields_at(parts)
    if fields is not None:
        return f" (known keys: {', '.join('.'.join([*parts, field]) for field in fields)})"
    *section, name = parts
    keys: dict[str, list[str]] = {}  # by name, which those in other sections may share
    for key in known_keys():
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    keys |= {field: [".".join([*section, field])] for field in _fields_at(section) or ()}
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.7)
    if close:
        return f" (did you mean {' or '.join(map(repr, keys[close[0]][:3]))}?)"
    return did_you_mean(section)


def _fields_at(parts: Sequence[str]) -> Iterable[str] | None:
    """The names in a section, in the whole configuration if empty; None if it does not exist."""
    section: Any = Config
    names = iter(parts)
    for name in names:
        if name not in section.model_fields:
            return None
        annotation = section.model_fields[name].annotation
        named = _section_of_names(annotation)
        if named is not None:
            next(names, None)  # chosen by the user
        section = named or annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return None
    return section.model_fields


def _section_of_names(annotation: Any) -> type[BaseModel] | None:
    """The type of the sections of a setting that maps names to sections; None for others."""
    value = get_args(annotation)[-1] if get_origin(annotation) is dict else None
    return value if isinstance(value, type) and issubclass(value, BaseModel) else None


def known_keys() -> list[str]:
    """Every dotted key that ``--set`` accepts, without sections."""

    def visit(section: BaseModel, prefix: str) -> Iterator[str]:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                yield from visit(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(visit(Config(), ""))


def described_keys(is_read: Callable[[str], bool]) -> list[tuple[str, str]]:
    """(dotted key, one-line description with default) of the settings to show in ``--help``.

    A section like one that is listed already is one line that refers to it.
    """
    listed: dict[type[BaseModel], tuple[str, BaseModel]] = {}

    def visit(section: BaseModel, prefix: str) -> list[tuple[str, str]]:
        rows = []
        for field_name, field in type(section).model_fields.items():
            key, default = f"{prefix}{field_name}", getattr(section, field_name)
            if not isinstance(default, BaseModel):
                if is_read(key):
                    text = " ".join((field.description or "").split()).replace("``", "")
                    text += _choices(field.annotation, field.description or "")
                    rows.append((key, f"{text} [{_shown(default)}]"))
                    if named := _section_of_names(field.annotation):
                        rows += visit(named(), f"{key}.NAME.")
            elif type(default) not in listed:
                if section_rows := visit(default, f"{key}."):
                    listed[type(default)] = key, default
                    rows += section_rows
            elif is_read(f"{key}.*"):
                rows.append((f"{key}.*", _like(default, *listed[type(default)])))
        return rows

    return visit(Config(), "")


def _choices(annotation: object, description: str) -> str:
    """The values that a setting can have, unless its description names all of them (as ``X``)."""
    while (parts := get_args(annotation)) and get_origin(annotation) is not Literal:
        annotation = parts[0]
    names = [str(part) for part in parts]
    is_described = all(f"``{name}``" in description for name in names)
    return "" if is_described else f" One of {', '.join(names)}."


def _like(section: BaseModel, key: str, other: BaseModel) -> str:
    """How a section differs from the same one under another key."""
    values = {name: _shown(getattr(section, name)) for name in type(section).model_fields}
    different = [f"{n}={v}" for n, v in values.items() if v != _shown(getattr(other, n))]
    defaults = f"; different defaults: {', '.join(different)}" if different else ""
    return f"The same settings as {key}.*{defaults}."


def _shown(value: object) -> str:
    """A default as one would write it in YAML."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)
