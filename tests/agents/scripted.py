"""A server whose model follows a script: it reads a file, writes a word of it to another, and answers.

Everything but the engine is the real server. The chat template writes the conversation as JSON, so that the script
reads what a client sent as a model would get it; its answers are what a model writes: thinking, text, and calls in
the form of Qwen3-Coder, of whatever tools the client has declared. Prints its address, then a line for each request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec

from mixbit.engine.demo import ensure_demo
from mixbit.engine.logs import start_logging
from mixbit.engine.protocol import Generate
from mixbit.engine.tokenizer import Tokenizer, load_tokenizer
from mixbit.server.app import create_app
from mixbit.server.model import ServedModel
from mixbit.server.parsing.machine import ReasoningMarkers
from mixbit.server.parsing.qwen3_coder import QWEN3_CODER
from mixbit.server.presets import SamplingDefaults
from mixbit.server.service import Service, Services
from mixbit.server.serving import listen
from mixbit.server.settings import LOOPBACK_HOSTS, Access
from mixbit.server.templates import ChatTemplate
from mixbit.server.web import make_server
from tests.fakes import FAKE_READY, FakeEngine, Reply
from tests.server.parsing.writing import qwen3_coder

MODEL = "scripted-coder"
CONTEXT = 262_144
TASK = (
    "Read the file {directory}/notes.txt, write the word in it to the file {directory}/word.txt, then say it backwards."
)
NOTES = "The word is: {word}\n"

# It mentions tool_calls, so that calls of earlier turns stay as they are.
_TEMPLATE = "{{ {'tools': tools, 'messages': messages} | tojson }}"
_PIECE = 7  # characters of one token of the script's
_READERS = ("read", "read_file", "Read")
_WRITERS = ("write", "write_file", "Write")
_SHELLS = ("exec_command", "shell_command", "shell", "bash", "Bash", "run_shell_command")


def answer(tools: list[dict[str, Any]], messages: list[dict[str, Any]]) -> str:
    """What the model writes next."""
    said = "\n".join(message["content"] for message in messages if message["role"] == "user")
    task = re.search(r"Read the file (\S+)/notes\.txt", said)
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if task is None or not functions:
        return "A word, read and written"  # asked for a title, or for a summary
    results = [message["content"] for message in messages if message["role"] == "tool"]
    notes, target = f"{task[1]}/notes.txt", f"{task[1]}/word.txt"
    if not results:
        call = _call(functions, _READERS, notes, f"cat {notes}", "")
        return f"<think>\nI must read it first.\n</think>\n\nI read the notes.\n{call}"
    word = re.search(r"The word is: (\w+)", "\n".join(results))
    if word is None:
        return f"There is no word in {results}"
    if len(results) == 1:
        text = f"{word[1]}\n"
        call = _call(functions, _WRITERS, target, f"printf '%s\\n' {word[1]} > {target}", text)
        return f"<think>\nThe word is {word[1]}.\n</think>\n\n{call}"
    return f"Backwards it is {word[1][::-1]}."


def _call(functions: dict[str, Any], names: tuple[str, ...], path: str, command: str, text: str) -> str:
    """A call of the first of `names` that there is, else of a shell."""
    name = next((name for name in (*names, *_SHELLS) if name in functions), None)
    if name is None:
        return f"None of the tools can do it: {sorted(functions)}"
    schema = functions[name].get("parameters") or {}
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    arguments: dict[str, Any] = {}
    for key, inner in properties.items():
        if (value := _value(key, inner, path, command, text)) is not None:
            arguments[key] = value
        elif key in required:
            arguments[key] = _neutral(inner)
    return qwen3_coder([(name, arguments)])


def _value(key: str, schema: dict[str, Any], path: str, command: str, text: str) -> Any:
    """What the task says of an argument; None if nothing."""
    if key in {"command", "cmd"}:
        return ["bash", "-c", command] if schema.get("type") == "array" else command
    if key in {"content", "contents", "text"}:
        return text
    return path if key in {"path", "file_path", "filePath", "filepath", "absolute_path"} else None


def _neutral(schema: dict[str, Any]) -> Any:
    """A value for an argument that must be there."""
    if schema.get("enum"):
        return schema["enum"][0]
    return {"integer": 1, "number": 1, "boolean": False, "array": [], "object": {}}.get(
        schema.get("type", "string"), "word"
    )


@dataclasses.dataclass
class Script:
    """Replies, with the counts of tokens that the demo model's tokenizer and a cache of all prompts would give."""

    tokenizer: Tokenizer
    seen: list[list[int]] = dataclasses.field(default_factory=list)

    def reply(self, request: Generate) -> Reply:
        """The reply to one request."""
        assert isinstance(request.prompt, str)
        tokens = self.tokenizer.encode(request.prompt, add_special_tokens=False)
        cached = max((_common(tokens, earlier) for earlier in self.seen), default=0)
        self.seen.append(tokens)
        conversation = json.loads(request.prompt)
        text = answer(conversation["tools"] or [], conversation["messages"])
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        return Reply(pieces, delay=0.002, prompt_tokens=len(tokens), cached_tokens=min(cached, len(tokens) - 1))


def _common(one: list[int], other: list[int]) -> int:
    """Length of the prefix that both have."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def main() -> None:
    start_logging("info", "json", "%(message)s")
    script = Script(load_tokenizer(Path(ensure_demo(lambda *_: None))))
    engine = FakeEngine(script.reply, ready=msgspec.structs.replace(FAKE_READY, context_length=CONTEXT))
    model = ServedModel(
        names=(MODEL,),
        created=int(time.time()),
        defaults=SamplingDefaults(),
        template=ChatTemplate({"default": f"{{# tool_calls #}}{_TEMPLATE}"}, {}),
        template_problem="",
        fim=None,
        quantization="none",
        tools=QWEN3_CODER,
        reasoning=ReasoningMarkers("<think>", "</think>"),
    )
    with listen("127.0.0.1", 0) as sock:
        print(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", flush=True)
        app = create_app(Services((Service(engine, model),)), Access(hosts=LOOPBACK_HOSTS))
        asyncio.run(make_server(app).serve(sockets=[sock]))


if __name__ == "__main__":
    main()
