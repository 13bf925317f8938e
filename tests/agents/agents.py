"""How each agent is told of a server and given a task, with no telemetry and no question to a person.

A function writes an agent's configuration into a home directory that is empty otherwise, and returns its command.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where an agent runs, and the server that it is to use. url: the server's root. plain: it is only asked."""

    home: Path
    url: str
    model: str
    context: int
    plain: bool

    def write(self, path: str, text: str) -> None:
        """A file below the home directory."""
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@dataclass(frozen=True)
class Command:
    """What to run; the prompt comes last."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


ANSWER = 512  # tokens that an answer may have


def opencode(place: Place) -> Command:
    """AI SDK, chat completions."""
    model = {"name": place.model, "limit": {"context": place.context, "output": ANSWER}, "tool_call": True}
    options = {"baseURL": f"{place.url}/v1", "apiKey": "none"}
    config = {
        "provider": {
            "mixbit": {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {place.model: model}}
        },
        "model": f"mixbit/{place.model}",
        "share": "disabled",
        "autoupdate": False,
        "permission": "allow",
    }
    if place.plain:
        config["agent"] = {"build": {"prompt": "Answer.", "permission": {"*": "deny"}}}
    place.write(".config/opencode/opencode.json", json.dumps(config))
    names = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")
    return Command(["opencode", "run"], {f"OPENCODE_DISABLE_{name}": "1" for name in names})


def qwen_code(place: Place) -> Command:
    """The openai SDK, chat completions."""
    settings = {"telemetry": {"enabled": False}, "privacy": {"usageStatisticsEnabled": False}}
    place.write(".qwen/settings.json", json.dumps({**settings, "general": {"enableAutoUpdate": False}}))
    words = ["qwen", "--auth-type", "openai", "--openai-base-url", f"{place.url}/v1", "--openai-api-key", "none"]
    plain = ["--bare", "--system-prompt", "Answer.", "--core-tools", "read_file"] if place.plain else []
    return Command([*words, "--model", place.model, "--yolo", *plain, "--prompt"])


def continue_cli(place: Place) -> Command:
    """The openai SDK, chat completions."""
    place.write(
        "config.yaml",
        f"""name: local
version: 0.0.1
schema: v1
models:
  - name: Mixbit
    provider: openai
    model: {place.model}
    apiBase: {place.url}/v1
    apiKey: none
    roles: [chat]
    defaultCompletionOptions: {{contextLength: {place.context}, maxTokens: {ANSWER}}}
""",
    )
    words = ["cn", "--config", str(place.home / "config.yaml"), "--print"]
    plain = [word for name in ("Bash", "Edit", "MultiEdit", "Search", "List") for word in ("--exclude", name)]
    environment = {"CONTINUE_TELEMETRY_ENABLED": "0", "CONTINUE_GLOBAL_DIR": str(place.home / ".continue")}
    return Command([*words, *(plain if place.plain else ["--auto"])], environment)


def pi(place: Place) -> Command:
    """The openai SDK, chat completions."""
    model = {"id": place.model, "name": place.model, "contextWindow": place.context, "maxTokens": ANSWER}
    provider = {"baseUrl": f"{place.url}/v1", "api": "openai-completions", "apiKey": "none", "models": [model]}
    place.write(".pi/agent/models.json", json.dumps({"providers": {"mixbit": provider}}))
    # It keeps 16,384 tokens of every context free for a summary, which is more than the demo model has.
    place.write(".pi/agent/settings.json", json.dumps({"compaction": {"enabled": not place.plain}}))
    words = ["pi", "--offline", "--provider", "mixbit", "--model", place.model, "--no-session"]
    return Command([*words, *(["--no-tools"] if place.plain else []), "--print"], {"PI_TELEMETRY": "0"})


_CODEX_PLAIN = """
[features]
shell_tool = false
goals = false

[agents]
enabled = false
"""


def codex(place: Place) -> Command:
    """Responses."""
    place.write(
        ".codex/config.toml",
        f"""model = "{place.model}"
model_provider = "mixbit"
model_context_window = {place.context}
check_for_update_on_startup = false
{'model_instructions_file = "../answer.md"' if place.plain else ""}

[model_providers.mixbit]
name = "Mixbit"
base_url = "{place.url}/v1"
wire_api = "responses"

[analytics]
enabled = false
{_CODEX_PLAIN if place.plain else ""}""",
    )
    place.write("answer.md", "Answer.")
    words = ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return Command(words, {"CODEX_HOME": str(place.home / ".codex")})


def claude_code(place: Place) -> Command:
    """Anthropic's messages."""
    words = ["claude", "--model", place.model, "--allowedTools", "Read,Write"]
    plain = ["--tools", "", "--system-prompt", "Answer."] if place.plain else []
    environment = {
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": place.model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(ANSWER),
        "DISABLE_AUTOUPDATER": "1",
    }
    return Command([*words, *plain, "--print"], environment)


# By package: the command's configuration and the file below node_modules that runs it.
AGENTS: dict[str, Callable[[Place], Command]] = {
    "opencode-ai": opencode,
    "@qwen-code/qwen-code": qwen_code,
    "@continuedev/cli": continue_cli,
    "@mariozechner/pi-coding-agent": pi,
    "@openai/codex": codex,
    "@anthropic-ai/claude-code": claude_code,
}
