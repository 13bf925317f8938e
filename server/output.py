"""What a chat request wants of the output: how it is read, and what it must match.

An endpoint's way: `generate` has `output_grammar` and `syntax.markers`; then, for each choice,

    parser = output_parser(body, model, prompt)
    events = parser.feed(delta.text) ...; events = parser.finish()
    reason = finish_reason(parser, finished.reason)
"""

from __future__ import annotations

from typing import Any, Literal

from mixbit.engine.protocol import FinishReason, Grammar
from mixbit.server.errors import invalid
from mixbit.server.model import ServedModel
from mixbit.server.parsing.formats import opens_reasoning
from mixbit.server.parsing.harmony import CHANNEL, HARMONY, MESSAGE
from mixbit.server.parsing.machine import OutputParser, Syntax
from mixbit.server.parsing.tools import Rules, Tool, either, literal
from mixbit.server.schema.chat import (
    ChatCompletionNamedToolChoice,
    ChatCompletionRequestAssistantMessage,
    CreateChatCompletionRequest,
    ResponseFormatJsonSchema,
    ResponseFormatText,
)
from mixbit.server.schema.common import SamplingFields
from mixbit.server.settings import GRAMMAR


def offered_tools(body: CreateChatCompletionRequest) -> dict[str, Tool]:
    """The functions that may be called, by name. Raises a 400 for two of one name."""
    tools: dict[str, Tool] = {}
    for index, each in enumerate(() if body.tool_choice == "none" else body.tools or ()):
        function, param = each.function, f"tools[{index}].function"
        if function.name in tools:
            raise invalid(f"'{param}.name': there are two functions {function.name!r}.", f"{param}.name")
        tools[function.name] = Tool(function.name, function.parameters or {}, bool(function.strict), param)
    return tools


def output_syntax(body: CreateChatCompletionRequest, model: ServedModel, prompt: str) -> Syntax:
    """What is to be told apart in the output that follows `prompt`."""
    channels = model.tools is HARMONY
    tools = model.tools if offered_tools(body) else None
    reasoning = None if channels or body.grammar is not None else model.reasoning
    last = body.messages[-1]
    prefill = None
    if isinstance(last, ChatCompletionRequestAssistantMessage):
        prefill = last.content if isinstance(last.content, str) else ""
    inside = reasoning is not None and opens_reasoning(prompt, reasoning, prefill)
    if prefill and not inside:
        reasoning = None  # the answer has begun
    return Syntax(tools, reasoning, inside, channels)


def output_parser(body: CreateChatCompletionRequest, model: ServedModel, prompt: str) -> OutputParser:
    """A parser for one choice."""
    return OutputParser(output_syntax(body, model, prompt), offered_tools(body))


def finish_reason(parser: OutputParser, reason: FinishReason) -> Literal["stop", "length", "tool_calls"]:
    """Why the choice ended, for the client."""
    return "tool_calls" if reason == "stop" and parser.called else reason


def explicit_grammar(body: SamplingFields) -> Grammar | None:
    """The grammar that the request gives itself."""
    if body.grammar is None:
        return None
    if isinstance(body.grammar, str):
        return Grammar(lark=body.grammar, param="grammar")
    if body.grammar.syntax == "lark":
        return Grammar(lark=body.grammar.definition, param="grammar")
    return Grammar(lark="start: pattern_0", param="grammar", patterns=[body.grammar.definition])


def output_grammar(body: CreateChatCompletionRequest, model: ServedModel, syntax: Syntax) -> Grammar | None:
    """What the output must match; None if it is free. Raises a 400 for wishes that cannot be united."""
    tools = offered_tools(body)
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, ChatCompletionNamedToolChoice)
    chosen = _chosen(body, tools)
    shaped = body.response_format is not None and not isinstance(body.response_format, ResponseFormatText)
    if body.grammar is not None:
        for wish, param in ((shaped, "response_format"), (forced, "tool_choice")):
            if wish:
                raise invalid(f"'grammar' cannot be used together with '{param}'.", "grammar")
        return explicit_grammar(body)
    rules = Rules("tools" if not shaped else "response_format")
    limited = bool(tools) and (body.parallel_tool_calls is False or any(tool.strict for tool in tools.values()))
    if not (forced or shaped or limited):
        return None
    if forced:
        start = f"{rules.marker(model.tools.openers[0])} {_calls(body, model, chosen, rules)}"
    else:
        start = _choice(body, model, chosen, rules, _shape(body, rules, syntax) if shaped else None)
    return rules.grammar(_after_thinking(syntax, rules, start))


def _chosen(body: CreateChatCompletionRequest, tools: dict[str, Tool]) -> list[Tool]:
    """The tools that may be called, as `tool_choice` has it."""
    choice = body.tool_choice
    if choice == "required" and not tools:
        raise invalid("'tool_choice' is 'required', but there are no 'tools'.", "tool_choice")
    if not isinstance(choice, ChatCompletionNamedToolChoice):
        return list(tools.values())
    name = choice.function.name
    if name not in tools:
        raise invalid(f"'tool_choice' names {name[:100]!r}, which is not among the 'tools'.", "tool_choice")
    return [tools[name]]


def _calls(body: CreateChatCompletionRequest, model: ServedModel, tools: list[Tool], rules: Rules) -> str:
    named = isinstance(body.tool_choice, ChatCompletionNamedToolChoice)
    for tool in tools:
        check_schema(tool.parameters, f"{tool.param}.parameters")
    most = 1 if named or body.parallel_tool_calls is False else GRAMMAR.max_calls
    return model.tools.grammar(rules, tools, most)


def _choice(
    body: CreateChatCompletionRequest, model: ServedModel, tools: list[Tool], rules: Rules, shape: str | None
) -> str:
    """An answer, in its shape if it has one, or calls."""
    if not tools:
        return shape or ""
    opener = model.tools.openers[0]
    calls = _calls(body, model, tools, rules)
    if shape is not None:
        return either([shape, f"{rules.marker(opener)} {calls}"])
    if model.tools is HARMONY:
        raise invalid(
            "'tools': strict functions and 'parallel_tool_calls': false need 'tool_choice' 'required' or a name with "
            "this model.",
            "tools",
            "unsupported_value",
        )
    if model.tools.at_start:
        return either([rules.pattern(r"[^\[](?s:.*)"), f"{rules.marker(opener)} {calls}"])
    return either([rules.without(opener), f"{rules.until(opener)} {calls}"])


def _shape(body: CreateChatCompletionRequest, rules: Rules, syntax: Syntax) -> str:
    """The answer as `response_format` has it."""
    schema: dict[str, Any] = {"type": "object"}
    lenient, param = True, "response_format"
    if isinstance(body.response_format, ResponseFormatJsonSchema):
        wanted = body.response_format.json_schema
        schema, lenient, param = wanted.schema_ or {}, not wanted.strict, "response_format.json_schema.schema"
        check_schema(schema, param)
    shape = rules.schema(schema, param, lenient=lenient)
    if syntax.channels:
        return f"{rules.marker(CHANNEL)} {literal('final')} {rules.marker(MESSAGE)} {shape}"
    return shape


def _after_thinking(syntax: Syntax, rules: Rules, start: str) -> str:
    if syntax.reasoning is None:
        return start
    space = rules.pattern(r"[ \n]{1,2}")
    thinking = f"{rules.until(syntax.reasoning.close)} {space}?"
    return f"{thinking} {start}" if syntax.inside else f"({rules.marker(syntax.reasoning.open)} {thinking})? {start}"


def check_schema(schema: Any, param: str) -> None:
    """Raise a 400 unless a schema is within the bounds of configs/limits.toml."""
    nodes = 0
    level: list[Any] = [schema]
    for _ in range(GRAMMAR.max_schema_depth):
        nodes += len(level)
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            break
    if level:
        raise invalid(f"'{param}' is deeper than {GRAMMAR.max_schema_depth} levels.", param)
    if nodes > GRAMMAR.max_schema_nodes:
        raise invalid(f"'{param}' has {nodes} parts; {GRAMMAR.max_schema_nodes} are the most.", param)
