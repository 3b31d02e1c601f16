"""The grammar of an answer in channels: reasoning first, then calls in Gemma 4's syntax or what else is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_mtp.errors import SettingsError
from gemma_mtp.text.chat_parser import CALL, CALL_END, CHANNEL, CHANNEL_END, QUOTE, ChatParser
from gemma_mtp.text.guidance import Guide

_NAME = re.compile(r"[^\s{}:]+")  # what the parser reads as the name of a function
_MOST_RULES = 10_000  # larger grammars take seconds and gigabytes
_BARE_KEY = re.compile(r"[^\s{}\[\]:,\"<|]+")

# What any value may be, where a schema says no more. Text is whatever does not spell out the mark at its end, and
# numbers are none too large for whoever reads them.
_VALUES = r"""
any: string | NUMBER | "true" | "false" | "null" | list | object
list: "[" (any ("," any)*)? "]"
object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"
string: QUOTE TEXT? QUOTE
TEXT: /(.|\n)+/ & ~/(.|\n)*<\|"\|>(.|\n)*/
KEY: /[A-Za-z_][A-Za-z0-9_-]*/
NUMBER: /-?(0|[1-9][0-9]{0,99})(\.[0-9]{1,99})?([eE][+-]?[0-9][0-9]?)?/
INTEGER: /-?(0|[1-9][0-9]{0,99})/
"""


def answer_grammar(
    guide: Guide,
    parser: ChatParser,
    thinking: bool,
    answer: dict[str, Any] | None,
    tools: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Grammars for `Guide.constraint`: of an answer that is `answer`, or calls of these tools, after some reasoning.

    parser: what will read it. answer: an entry of that list; None: only calls will do. Raises SettingsError.
    """
    marks = _Marks(guide)
    choices, rules = [], ["start: thought body", f"thought: {_thought(marks, parser, thinking)}"]
    if answer is not None:
        choices.append("@answer")
    if tools:
        choices.append("call+")
        rules += _calls(marks, tools)
    rules.append("body: " + " | ".join(choices))
    return [{"lark_grammar": "\n".join(rules)}, *([answer | {"name": "answer"}] if answer is not None else [])]


def _thought(marks: _Marks, parser: ChatParser, thinking: bool) -> str:
    words = r"/(.|\n)+/?"
    if parser.in_reasoning:
        return f"{words} {marks[CHANNEL_END]}"
    return f"({marks[CHANNEL]} {words} {marks[CHANNEL_END]})?" if thinking else '""'


def _calls(marks: _Marks, tools: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [tool["function"]["name"] for tool in tools]
    if odd := next((name for name in names if not _NAME.fullmatch(name)), None):
        raise SettingsError(f"The function '{odd}' cannot be called: its name has a space, a brace or a colon.")
    values = _Values(marks[QUOTE])
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters") or {}
        calls.append(f"{_literal(function['name'])} {values.arguments(parameters)}")
    rules = [f"call: {marks[CALL]} \"call:\" ({' | '.join(calls)}) {marks[CALL_END]}"]
    return [*rules, *values.rules, _VALUES.replace("QUOTE", marks[QUOTE])]


class _Marks:
    """Markup, each of which must be one token, as a grammar names it."""

    def __init__(self, guide: Guide):
        self._guide = guide

    def __getitem__(self, text: str) -> str:
        token = self._guide.token(text)
        if token is None:
            raise SettingsError(f"Calls cannot be forced: this model's vocabulary has no token '{text}'.")
        return f"<[{token}]>"


class _Values:
    """JSON schemas as rules of a grammar. What it knows of them: type, enum, const, properties, required, items, anyOf,
    oneOf and local references; other keywords narrow nothing down."""

    def __init__(self, quote: str):
        self._quote = quote
        self.rules: list[str] = []
        self._root: Any = None
        self._references: dict[str, str] = {}

    def arguments(self, schema: Any) -> str:
        """The rule of a call's arguments. Raises SettingsError."""
        self._root, self._references = schema, {}
        try:
            rule = self._of(schema)
        except RecursionError:
            raise SettingsError("A tool's parameters are nested too deeply.") from None
        return "object" if rule == "any" else rule

    def _add(self, rule: str) -> str:
        if len(self.rules) == _MOST_RULES:
            raise SettingsError("The tools' parameters are too large for calls to be forced.")
        name = f"v{len(self.rules)}"
        self.rules.append(f"{name}: {rule}")
        return name

    def _of(self, schema: Any) -> str:
        if not isinstance(schema, Mapping):
            return "any"
        if isinstance(reference := schema.get("$ref"), str):
            return self._referred(reference)
        if isinstance(allowed := [schema["const"]] if "const" in schema else schema.get("enum"), list) and allowed:
            return self._add(" | ".join(map(self._constant, allowed)))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list) and options:
                return self._add(" | ".join(map(self._of, options)))
        kind = schema.get("type")
        if isinstance(kind, list) and (kinds := dict.fromkeys(one for one in kind if isinstance(one, str))):
            return self._add(" | ".join(self._of({**schema, "type": one}) for one in kinds))
        if isinstance(schema.get("properties"), Mapping) and kind in (None, "object"):
            return self._object(schema["properties"], schema.get("required"))
        if kind == "array":
            item = self._of(schema.get("items"))
            return self._add(f'"[" ({item} ("," {item})*)? "]"')
        simple = {"string": "string", "integer": "INTEGER", "number": "NUMBER", "object": "object", "null": '"null"'}
        if kind == "boolean":
            return '("true" | "false")'
        return simple.get(kind, "any") if isinstance(kind, str) else "any"

    def _object(self, properties: Mapping[str, Any], required: Any) -> str:
        """Members in the order of their names, in which templates write them."""
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        after = first = '""'  # what may come after members before, and where there are none
        for name in sorted(properties, reverse=True):
            key = _literal(name) if _BARE_KEY.fullmatch(name) else f"{self._quote} {_literal(name)} {self._quote}"
            member = self._add(f'{key} ":" {self._of(properties[name])}')
            if name in needed:
                first, after = self._add(f"{member} {after}"), self._add(f'"," {member} {after}')
            else:
                first, after = self._add(f"{member} {after} | {first}"), self._add(f'("," {member})? {after}')
        return self._add(f'"{{" {first} "}}"')

    def _referred(self, reference: str) -> str:
        if reference not in self._references:
            name = self._references[reference] = self._add("")  # the rule may refer to itself
            place = int(name[1:])
            self.rules[place] = f"{name}: {self._of(self._found(reference))}"
        return self._references[reference]

    def _found(self, reference: str) -> Any:
        found = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None or not reference.startswith("#"):
            raise SettingsError(f"A tool's parameters refer to '{reference}', which is not a schema among them.")
        return found

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        if isinstance(value, list):
            return " ".join(['"["', *_joined([self._constant(item) for item in value]), '"]"'])
        if isinstance(value, dict):
            members = [f'{_literal(key)} ":" {self._constant(value[key])}' for key in sorted(value)]
            return " ".join(['"{"', *_joined(members), '"}"'])
        try:
            return _literal(json.dumps(value, allow_nan=False))
        except ValueError:
            raise SettingsError("A tool's parameters have a number that is not finite.") from None


def _joined(parts: Sequence[str]) -> list[str]:
    return [piece for place, part in enumerate(parts) for piece in (['","'] if place else []) + [part]]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
