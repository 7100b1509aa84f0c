"""How rows become requests: the templates of cdc.config_serving.RequestConfig.

`{name}` stands for a column's value, `{{` and `}}` for braces. A text of the body that is nothing but `{name}` becomes
the value with its type, `{name}` within a text its text. In the path a value is escaped, and neither empty nor a step
to another folder, so that a row reaches its own address only; in a header it holds no control characters. In the path
alone, `{env:NAME}` and `{file:/path}` stand for a secret, as it is. `{cdc.idempotency_key}` is the row's key, or the
request's outside of `item`. With `rows_per_request` above 1, columns stand in `item` only, and `{items}` in the body.

Everything that can be wrong with the templates themselves is found before the first row (`problems`). It sends nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import orjson

from cdc.config_serving import RequestConfig
from connectors.http.values import Unsayable, to_json, to_text

KEY: Final = "cdc.idempotency_key"
ITEMS: Final = "items"
SECRET: Final = re.compile(r"(env|file):.+")
HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
OURS: Final = frozenset({"host", "content-length", "transfer-encoding", "connection", "expect"})
"""Headers that the client writes itself."""
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_SECRET_PATH: Final = re.compile(r"[A-Za-z0-9._~/-]+")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")


class RowRefused(Exception):
    """A row cannot become a request. The text holds no value of it."""


@dataclass(frozen=True, slots=True)
class Name:
    """`{name}` in a template."""

    name: str


Parts = tuple[str | Name, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A request as it is sent, but for the target's own headers."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row on its way into a request: its idempotency key and, of a request for several, what it becomes there."""

    row: Mapping[str, Any]
    key: str
    json: bytes = b""


class RequestTemplate:
    """A compiled RequestConfig over rows with these columns (None: not known yet, so names are not checked).
    Thread-safe."""

    def __init__(self, request: RequestConfig, columns: Iterable[str] | None) -> None:
        self._request = request
        self.several = request.rows_per_request > 1
        self.problems: list[str] = []
        """What is wrong with the templates, each as `key: words`; with any, nothing can be built."""
        self.secrets: dict[str, str] = {}
        """References that the path names, and what they stand for: filled by whoever reads secrets."""
        self._knows_columns = columns is not None
        self._columns = frozenset(columns or ())
        shared = frozenset({KEY}) if self.several else self._columns | {KEY}
        self._path = self._compiled("path", request.path, shared, secrets=True)
        self._headers = {n: self._compiled(f"headers.{n}", text, shared) for n, text in request.headers.items()}
        self._body = self._structure("body", request.body, shared | ({ITEMS} if self.several else set()))
        self._item = self._structure("item", request.item, self._columns | {KEY}) if self.several else None
        self._check()

    @property
    def addresses_rows(self) -> bool:
        """Whether the path differs from row to row."""
        return any(isinstance(part, Name) and part.name in self._columns for part in self._path)

    def item(self, row: Mapping[str, Any], key: str) -> Item:
        """A row as it goes into `build`; RowRefused."""
        values = {**row, KEY: key}
        return Item(row=row, key=key, json=to_json(_rendered(self._item, values)) if self.several else b"")

    def build(self, items: Sequence[Item]) -> Built:
        """The request for these rows (one, if it is not for several). RowRefused, for a single row only."""
        key = items[0].key
        values: dict[str, Any] = {**items[0].row, KEY: key, **self.secrets}
        if self.several:
            key = hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()
            listed = orjson.Fragment(b"[" + b",".join(item.json for item in items) + b"]")
            values = {KEY: key, ITEMS: listed, **self.secrets}
        request = self._request
        headers = {name: _header(name, parts, values) for name, parts in self._headers.items()}
        if request.idempotency_header:
            headers[request.idempotency_header] = key
        body = None
        if request.body is not None:
            body = to_json(_rendered(self._body, values))
            if "content-type" not in {name.lower() for name in headers}:
                headers["Content-Type"] = "application/json"
        return Built(method=request.method, path=self._address(values), headers=headers, body=body)

    def _address(self, values: Mapping[str, Any]) -> str:
        found = []
        for part in self._path:
            if isinstance(part, str):
                found.append(part)
                continue
            text = to_text(_said(part, values))
            if not text:
                raise RowRefused(f"{part.name} is NULL or empty, and stands in the path")
            found.append(text if part.name in self.secrets else quote(text, safe=""))
        path = "".join(found)
        if {".", ".."} & set(path.partition("?")[0].split("/")):
            raise RowRefused("a value of the path is a step to another folder")
        return path

    # ------------------------------------------------------------------ compiling

    def _check(self) -> None:
        request, problems = self._request, self.problems
        if self.several and not _holds(self._body, ITEMS):
            problems.append("body: lacks {items}, which the rows stand in")
        named = [*request.headers, *filter(None, [request.idempotency_header])]
        for name in named:
            if not HEADER_NAME.fullmatch(name) or name.lower() in OURS:
                problems.append(f"headers.{name}: is no header that can be set")
        if len({name.lower() for name in named}) != len(named):
            problems.append("headers: one stands there twice (the idempotency_header counts)")
        path = "".join(part for part in self._path if isinstance(part, str))
        if path and path[0] not in "/?" and isinstance(self._path[0], str):
            problems.append("path: begins with / or ?")
        if re.search(r"[^\x21-\x7e]|#", path):
            problems.append("path: holds a blank, a # or a character that must be escaped")
        if {".", ".."} & set(path.partition("?")[0].split("/")):
            problems.append("path: holds a step to another folder")

    def _compiled(self, at: str, text: str, known: frozenset[str], *, secrets: bool = False) -> Parts:
        try:
            parts = _parse(text)
        except ValueError as e:
            self.problems.append(f"{at}: {e}")
            return ()
        for part in parts:
            if isinstance(part, str) or part.name in known:
                continue
            if secrets and SECRET.fullmatch(part.name):
                self.secrets[part.name] = ""
            elif not self._knows_columns:
                continue
            elif self.several and part.name in self._columns:
                self.problems.append(f"{at}: {{{part.name}}} is of one row; with rows_per_request it stands in item")
            else:
                names = ", ".join(sorted(known))
                self.problems.append(f"{at}: there is no {{{part.name}}}; known: {names}")
        if at.startswith("headers.") and not _HEADER_VALUE.fullmatch("".join(p for p in parts if isinstance(p, str))):
            self.problems.append(f"{at}: holds a control character or one beyond ASCII")
        return parts

    def _structure(self, at: str, value: Any, known: frozenset[str]) -> Any:
        """The same with each text compiled."""
        if isinstance(value, str):
            return self._compiled(at, value, known)
        if isinstance(value, Mapping):
            return {str(key): self._structure(f"{at}.{key}", inner, known) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._structure(f"{at}[{i}]", inner, known) for i, inner in enumerate(value)]
        return value


def row_key(sync: str, key: str, digest: str, version: int, *, deletes: bool) -> str:
    """The idempotency key of one row's effect. Insert and update are one: what became of an insert unheard decides what
    it is called the next time. `version` tells the same content from the same content a second time, after another."""
    return hashlib.sha256(orjson.dumps([sync, "delete" if deletes else "write", key, digest, version])).hexdigest()


def _parse(text: str) -> Parts:
    parts: list[str | Name] = []
    literal, end = "", 0
    for found in _TOKEN.finditer(text):
        literal += text[end : found.start()]
        end = found.end()
        if found[1]:
            parts += [*filter(None, [literal]), Name(found[1])]
            literal = ""
        elif len(found[0]) == 2:
            literal += found[0][0]
        else:
            raise ValueError(f"a lone {found[0]}; write {found[0] * 2} for the character itself")
    return (*parts, *filter(None, [literal + text[end:]]))


def _holds(node: Any, name: str) -> bool:
    if isinstance(node, Mapping):
        return any(_holds(inner, name) for inner in node.values())
    if isinstance(node, list):
        return any(_holds(inner, name) for inner in node)
    return node == (Name(name),)


def _said(part: Name, values: Mapping[str, Any]) -> Any:
    """The value; RowRefused if it, or something within it, has no form in JSON."""
    value = values[part.name]
    within = [value]
    while within:
        each = within.pop()
        if isinstance(each, Unsayable):
            raise RowRefused(f"{part.name} has no form in JSON: {each.why}")
        within += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return value


def _rendered(node: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(node, tuple):
        if len(node) == 1 and isinstance(node[0], Name):
            return _said(node[0], values)
        return "".join(part if isinstance(part, str) else to_text(_said(part, values)) for part in node)
    if isinstance(node, Mapping):
        return {key: _rendered(inner, values) for key, inner in node.items()}
    if isinstance(node, list):
        return [_rendered(inner, values) for inner in node]
    return node


def _header(name: str, parts: Parts, values: Mapping[str, Any]) -> str:
    text = "".join(part if isinstance(part, str) else to_text(_said(part, values)) for part in parts)
    if not _HEADER_VALUE.fullmatch(text):
        raise RowRefused(f"the header {name} would hold a control character or one beyond ASCII")
    return text


def secret_path(text: str) -> bool:
    """Whether a secret may stand in a path as it is."""
    return bool(_SECRET_PATH.fullmatch(text)) and not {".", ".."} & set(text.split("/"))


__all__ = ["KEY", "Built", "Item", "RequestTemplate", "RowRefused", "row_key", "secret_path"]
