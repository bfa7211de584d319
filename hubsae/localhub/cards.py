"""Model and dataset cards: front matter, the checks a commit of README.md has to pass, and the tags made from them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

_FRONT = re.compile(r"^(\s*---[ \t]*\r?\n)(.*?)(\r?\n)?---[ \t]*(\r?\n|$)", re.DOTALL)
_ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf|html)/(\d{4}\.\d{4,5})")

_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community unknown
other
"""
LICENSES = frozenset(_NAMES.split())


class CardCheck(NamedTuple):
    """Findings about a README: each `{"message": ...}`."""

    errors: list[dict[str, str]]
    warnings: list[dict[str, str]]


def split_card(text: str) -> tuple[str | None, str]:
    """Front matter (None where there is none) and the rest of a README.

    >>> split_card("---\\nlicense: mit\\n---\\n# Hi")
    ('license: mit', '# Hi')
    """
    found = _FRONT.match(text)
    return (found[2], text[found.end() :]) if found else (None, text)


def card_data(text: str) -> dict[str, Any]:
    """The metadata of a README; empty where it is missing or broken."""
    try:
        data = _load(split_card(text)[0] or "")
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


MAX_FRONT = 256 * 1024  # characters of front matter
MAX_NODES = 50_000  # values and collections, as the parser counts them
MAX_DEPTH = 100


_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):
    """The safe loader, in C where PyYAML has it, that leaves dates as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _load(text: str) -> Any:
    """YAML in bounded time: no aliases (a few lines of them expand to gigabytes), bounded length, nodes and depth."""
    if len(text) > MAX_FRONT:
        raise yaml.YAMLError(f"longer than {MAX_FRONT} characters")
    try:
        depth = 0
        for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not supported in card metadata")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if count > MAX_NODES or depth > MAX_DEPTH:
                raise yaml.YAMLError(f"more than {MAX_NODES} values, or nested deeper than {MAX_DEPTH}")
        return _plain(yaml.load(text, Loader=_Loader))
    except (ValueError, RecursionError, TypeError) as why:  # bad escapes, absurd nesting, unhashable keys
        raise yaml.YAMLError(str(why) or type(why).__name__) from None


def _plain(value: Any) -> Any:
    """Only what JSON can say: keys become text, sets lists, bytes text, no NaN."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def check_card(text: str, kind: str) -> CardCheck:
    """What the Hub's validator says about a README of a repo of this kind (`model`, `dataset`, `space`).

    >>> check_card("---\\nlicense: nonsense\\n---\\n", "model").errors[0]["message"][:9]
    '"license"'
    """
    errors: list[str] = []
    warnings: list[str] = []
    front, _ = split_card(text)
    data: Any = None
    if front is None or not front.strip():
        warnings.append("empty or missing yaml metadata in repo card")
    else:
        try:
            data = _load(front)
        except yaml.YAMLError as why:
            errors.append(f"YAML metadata is not valid: {' '.join(str(why).split())}")
        if data is not None and not isinstance(data, dict):
            errors.append("YAML metadata must be a mapping")
    if isinstance(data, dict):
        _check_fields(data, kind, errors, warnings)
    return CardCheck([{"message": e} for e in errors], [{"message": w} for w in warnings])


def _check_fields(data: dict[str, Any], kind: str, errors: list[str], warnings: list[str]) -> None:
    licenses = data.get("license")
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name is None:
            continue
        if not isinstance(name, str) or name.lower() not in LICENSES:
            shown = ", ".join(sorted(LICENSES))
            errors.append(f'"license" must be one of [{shown}]')
            break
    if "model-index" in data and kind == "model":
        index = data["model-index"]
        if not isinstance(index, list):
            errors.append('"model-index" must be an array')
        else:
            for at, item in enumerate(index):
                if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                    errors.append(f'"model-index[{at}].name" is required')
                elif not isinstance(item.get("results"), list):
                    errors.append(f'"model-index[{at}].results" is required')
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key)
        if value is not None and not isinstance(value, list | str):
            errors.append(f'"{key}" must be an array')
    for key in ("pipeline_tag", "library_name"):
        if data.get(key) is not None and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    language = data.get("language")
    for code in language if isinstance(language, list) else [language]:
        if code is not None and (not isinstance(code, str) or not re.fullmatch(r"[A-Za-z-]{2,16}", code)):
            errors.append('"language" must only contain ISO 639 codes (quote "no")')
            break
    if kind == "dataset" and data.get("configs") is not None:
        configs = data["configs"]
        if not isinstance(configs, list):
            errors.append('"configs" must be an array')
        elif any(not isinstance(c, dict) or not c.get("config_name") for c in configs):
            errors.append('"configs[].config_name" is required')


def card_tags(kind: str, data: dict[str, Any], text: str, files: list[str]) -> list[str]:
    """The tags the Hub derives: library, formats seen, card tags, languages, datasets, base model, licence, arXiv."""
    tags: list[str] = []
    if kind == "models":
        if isinstance(data.get("library_name"), str):
            tags.append(data["library_name"])
        if any(f.endswith(".safetensors") for f in files):
            tags.append("safetensors")
    tags += _words(data.get("tags"))
    tags += _words(data.get("language"))
    if kind == "datasets":
        for key in ("task_categories", "task_ids", "size_categories", "language", "multilinguality", "source_datasets"):
            tags += [f"{key}:{v}" for v in _words(data.get(key))]
        formats = {"parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv", "arrow": "arrow"}
        tags += sorted({f"format:{formats[e]}" for f in files if (e := f.rsplit(".", 1)[-1]) in formats})
    tags += [f"dataset:{v}" for v in _words(data.get("datasets"))] if kind == "models" else []
    for base in _words(data.get("base_model")):
        tags.append(f"base_model:{base}")
        if isinstance(relation := data.get("base_model_relation"), str):
            tags.append(f"base_model:{relation}:{base}")
    tags += [f"arxiv:{number}" for number in sorted(set(_ARXIV.findall(text)))]
    tags += [f"license:{v}" for v in _words(data.get("license"))]
    tags.append("region:us")
    return list(dict.fromkeys(tags))


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
