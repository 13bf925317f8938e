"""The Jinja sandbox that chat templates run in: what they may call, for how long, and how much they may make.

Time is looked at in each turn of a loop. What runs in C between two looks (padding, repeating, joining, replacing)
is measured before it runs, and refused if its result would be too large; all results of one rendering count
against one budget, so that memory is bounded too.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mixbit.server.settings import TemplateLimits

_BUDGET = 16  # times max_chars: what all results of one rendering may add up to
_MAX_DIGITS = 100  # of `round`: further ones cost time alone
_ENTRY = 64  # bytes of a list's entry, about
# Methods of strings that make no text.
_QUESTIONS = re.compile(r"startswith|endswith|r?find|r?index|count|is[a-z]+")
# Filters that write their value as text, whatever it is.
_TO_TEXT = frozenset(
    {
        "string",
        "join",
        "format",
        "tojson",
        "pprint",
        "urlencode",
        "upper",
        "lower",
        "capitalize",
        "title",
        "trim",
        "replace",
        "center",
        "indent",
        "wordwrap",
        "truncate",
        "striptags",
        "escape",
        "e",
        "forceescape",
        "safe",
        "urlize",
        "wordcount",
        "xmlattr",
    }
)


class Limit(Exception):  # noqa: N818
    """Too much time or text."""


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline and a budget for each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: TemplateLimits) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=self._show
        )
        self.limits = limits
        self._local = threading.local()
        self.filters["tojson"] = _to_json
        self.filters = {name: self._bound(name, filter_) for name, filter_ in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def begin(self) -> None:
        """Start the clock and the budget of a rendering in this thread."""
        self._local.deadline = time.monotonic() + self.limits.seconds
        self._local.made = 0

    def tick(self) -> str:
        """Called by the template in each turn of a loop."""
        if time.monotonic() > self._local.deadline:
            raise Limit(f"it took longer than {self.limits.seconds:g} s")
        return ""

    def charge(self, size: int) -> None:
        """Count a result of `size` characters or entries."""
        if size > self.limits.max_chars:
            raise Limit(f"a result would be too large: {size} characters of {self.limits.max_chars}")
        made = getattr(self._local, "made", 0) + size
        if made > _BUDGET * self.limits.max_chars:
            raise Limit(f"its results add up to more than {_BUDGET * self.limits.max_chars} characters")
        self._local.made = made

    def from_source(self, source: str) -> Template:
        """Compile with a tick at the start of each loop body and macro, and with concatenations measured."""
        tree = _Rewrite(self).visit(self.parse(source))
        loops: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For),
            *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock),
        ]
        for node in loops:
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick).set_environment(self).set_lineno(node.lineno))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    # --- what templates do, each measured ---

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a macro, a call or a `set` block wrote."""
        parts = list(pieces)
        self.charge(sum(map(len, parts)))
        return "".join(parts)

    def joined(self, *parts: Any) -> str:
        """The operator `~`."""
        self.charge(sum(self._weight(part) for part in parts))
        return "".join(map(str, parts))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        part = value[start:stop:step]
        self.charge(len(part))
        return part

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make much of little."""
        if operator == "**":
            raise Limit("powers are not computed")
        if operator == "%" and isinstance(left, str):
            self.charge(self._format_size(left, right if isinstance(right, tuple) else (right,)))
        elif operator == "*":
            sized = max((self._weight(side) for side in (left, right) if hasattr(side, "__len__")), default=0)
            factor = max((abs(side) for side in (left, right) if isinstance(side, int)), default=0)
            self.charge(sized * min(factor, self.limits.max_chars + 1) if sized else factor.bit_length())
        elif hasattr(left, "__len__"):
            self.charge(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Methods of values are measured; macros and functions of ours measure themselves."""
        method = isinstance(function, types.BuiltinMethodType) and isinstance(function.__self__, str | bytes)
        if method and not _QUESTIONS.fullmatch(function.__name__):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            self.charge(self._text_size(function.__name__, str(function.__self__), [*args, *kwargs.values()]))
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, measured."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            self.charge(self._format_size(value.__self__, [*args, *kwargs.values()]))
            return inner(*args, **kwargs)

        return measured

    def _bound(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is measured before it runs. Keeps Jinja's marks on the function."""
        with_context = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            head, (value, *rest) = args[:with_context], args[with_context:]
            if name == "join" and isinstance(value, Iterator):
                value = list(value)
            options = [*rest, *kwargs.values()]
            if name == "round":
                _check_digits(options)
            elif name in _TO_TEXT:
                self.charge(self._filter_size(name, value, options))
            elif name in {"batch", "slice"}:
                self.charge(_ENTRY * _largest(options))
            return function(*head, value, *rest, **kwargs)

        return measured

    def _show(self, value: Any) -> Any:
        """What `{{ value }}` writes: the text of a container may be far larger than the container."""
        if not isinstance(value, str | int | float | Undefined):
            self.charge(self._weight(value))
        return value

    # --- sizes ---

    def _weight(self, value: Any) -> int:
        """About how many characters `value` has as text. Stops counting where it is too much in any case."""
        total, stack = 0, [value]
        while stack and total <= self.limits.max_chars:
            item = stack.pop()
            if isinstance(item, str | bytes):
                total += len(item) + 2
            elif isinstance(item, dict):
                total += 2 + 2 * len(item)
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, list | tuple | set | frozenset):
                total += 2 + 2 * len(item)
                stack.extend(item)
            else:
                total += 8
        return total

    def _format_size(self, text: str, args: Iterable[Any]) -> int:
        """At most what a format string makes: each field may show every argument at every width."""
        values = list(args)
        fields = text.count("{") + text.count("%")
        widths = sum(int(digits[:12]) for digits in re.findall(r"\d+", text))
        if "*" in text or text.count("{") > 1:
            widths += fields * _largest(values)
        return len(text) + widths + fields * self._weight(values)

    def _text_size(self, method: str, text: str, args: list[Any]) -> int:
        """At most what a method of a string makes."""
        if method == "replace" and len(args) >= 2:
            return len(text) + self._replaced(text, args[0], args[1])
        if method == "join":
            items = list(args[0]) if args and isinstance(args[0], Iterable) else []
            return self._weight(items) + len(text) * len(items)
        if method == "expandtabs":
            return len(text) + max(1, text.count("\t")) * max(8, _largest(args))
        if method == "translate":
            return len(text) * max(1, self._weight(args))
        return len(text) + _largest(args)

    def _filter_size(self, name: str, value: Any, options: list[Any]) -> int:
        """At most what a filter makes that writes text."""
        size, widest = self._weight(value), max(_largest(options), self._weight(options))
        if name == "replace" and len(options) >= 2:
            return size + self._replaced(str(value), options[0], options[1])
        if name == "format":
            return self._format_size(str(value), options)
        if name == "join":
            return size + widest * (len(value) if hasattr(value, "__len__") else 1)
        if name in {"indent", "wordwrap"}:
            lines = str(value).count("\n") + 1 if name == "indent" else size
            return size + (widest if name == "indent" else self._weight(options)) * lines
        if name in {"tojson", "pprint"}:
            indent = _largest(options)
            return size * (1 + indent * (1 if indent <= 8 else 64))  # deep values indent deeply
        return size + widest

    def _replaced(self, text: str, old: Any, new: Any) -> int:
        return (text.count(str(old)) if old else len(text) + 1) * self._weight(new)


class _Rewrite(NodeTransformer):
    """`a ~ b` and `a[b:c]` become calls that are measured."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """See the class."""
        self.generic_visit(node)
        return self._call("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """See the class."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._call("sliced", [node.node, *bounds], node.lineno)

    def _call(self, name: str, args: list[nodes.Expr], lineno: int) -> nodes.Node:
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        return call.set_environment(self._environment).set_lineno(lineno)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _largest(values: Iterable[Any]) -> int:
    """The largest whole number among arguments: a width, a count."""
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _check_digits(options: list[Any]) -> None:
    if _largest(options) > _MAX_DIGITS:
        raise Limit(f"'round' is limited to {_MAX_DIGITS} digits")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, as models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if re.search(r"\d{3}", pattern):  # the C library pads to any width
        raise Limit("'strftime_now' takes no such width")
    return datetime.now().strftime(pattern)
