"""A model's jinja chat template: messages -> the prompt text, as Hugging Face transformers renders it.

Runs in: shard, simulator, load generator.

Contract: same text as `apply_chat_template(..., tokenize=False)` of transformers 5 for plain JSON messages; the test does
    both and compares. Whatever a template or a client's message does wrong ends in PromptError. A template runs in
    jinja2's immutable sandbox: it comes from a model's folder, which is not our code. ChatTemplate is immutable and may be
    used from any thread.

Why the content format is found here: SGLang looks at the template's syntax tree once, to learn whether the template
    walks over a list of content parts or prints `content` as a string, and shapes every message accordingly.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sglfast.errors import ConfigError, PromptError
from sglfast.prompt.vllm_format import ContentFormat as ContentFormat
from sglfast.prompt.vllm_format import content_format_of_vllm
from sglfast.shm import Engine

# Variables that the renderer sets itself and words that transformers takes as its own arguments: with one of them in a
# request's chat_template_kwargs, SGLang answers 400.
RESERVED_KWARGS = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "conversation"),
        *("chat_template", "tokenize", "return_dict"),
    }
)
# A template with one of these words in it is taken to be a multimodal one, which reads parts (SGLang's short cut).
MULTIMODAL_WORDS = ("image", "audio", "video", "vision")
_HARMONY_WORD = "<|channel|>"
MESSAGE_VARIABLES = ("message", "msg", "m")
# Marks the end of the message to continue. Plain ASCII, since some templates print Python's repr of a value; it ends with
# a space to see whether the template trims what it prints.
CONTINUE_MARK = "SGLFAST_CONTINUES_THIS_MESSAGE_HERE "


class ChatTemplate:
    """One compiled chat template and the special tokens that it sees as variables.

    content_format: "openai" when the template iterates over content parts, else "string"; source, special_tokens: as given.
    """

    __slots__ = ("_format_of_vllm", "_takes_inline_system", "_template", "content_format", "source", "special_tokens")

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; raises ConfigError with the line when it is no valid template."""
        environment = _shared_environment()
        try:
            self._template = environment.from_string(source)
            self.content_format: ContentFormat = _content_format(source, environment.parse(source))
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ConfigError(f"chat template: not valid jinja2 (line {line}): {error}") from error
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._takes_inline_system: bool | None = None
        self._format_of_vllm: ContentFormat | None = None

    def format_for(self, engine: Engine) -> ContentFormat:
        """The form in which an engine gives this template the content of messages."""
        if engine == "sglang":
            return self.content_format
        if self._format_of_vllm is None:
            self._format_of_vllm = content_format_of_vllm(_shared_environment().parse(self.source))
        return self._format_of_vllm

    @property
    def is_harmony(self) -> bool:
        """Whether the model is one whose /v1/responses SGLang does not render with its template (gpt-oss)."""
        return _HARMONY_WORD in self.source

    @property
    def takes_inline_system(self) -> bool:
        """Whether a system message between others is printed, as SGLang 0.5.23 finds out: with bare jinja2, and no special tokens."""
        if self._takes_inline_system is None:
            self._takes_inline_system = _takes_inline_system(self.source)
        return self._takes_inline_system

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text.

        tools: JSON schemas of functions; kwargs: further template variables (`documents` is one), which win over the special
        tokens; continue_final_message: end inside the last message, after its text, so that the model goes on writing it
        (needs add_generation_prompt=False). Raises PromptError, also when the template itself refuses the conversation.
        """
        chat = self._chat(messages, kwargs)
        continued = ""
        if continue_final_message:
            if add_generation_prompt:
                raise PromptError("continue_final_message and add_generation_prompt exclude each other")
            continued = _mark_end(chat[-1])
        try:
            text = self._template.render(self._variables(kwargs), messages=chat, tools=tools, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can raise anything: its own errors, TypeError, RecursionError ...
            raise PromptError(f"the chat template refuses the conversation: {error}") from error
        return _cut_at_mark(text, continued) if continue_final_message else text

    def parts(self, messages: Sequence[Mapping[str, Any]], *, kwargs: Mapping[str, Any] | None = None) -> Iterator[str]:
        """The text of `render(messages, kwargs=kwargs)` bit by bit, each rendered when it is asked for; then it can raise anything."""
        variables = self._variables(kwargs)
        variables.update(messages=self._chat(messages, kwargs), tools=None, add_generation_prompt=True)
        return self._template.root_render_func(self._template.new_context(variables))

    def _chat(self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        reserved = sorted(RESERVED_KWARGS.intersection(kwargs)) if kwargs else []
        if reserved:
            raise PromptError(f"chat_template_kwargs must not contain {', '.join(reserved)}")
        if not messages:
            raise PromptError("messages must not be empty")
        if not all(isinstance(message, Mapping) for message in messages):
            raise PromptError("every message must be an object")
        # Clients write `"content": null`; templates expect a missing key instead.
        return [{key: value for key, value in message.items() if value is not None} for message in messages]

    def _variables(self, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"documents": None, **self.special_tokens, **(kwargs or {})}


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the assistant's text for training masks; prints its body here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call block: variables set inside stay inside, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a short way to `message.content`, which else is an exception caught and two calls, to `ns.found`, `loop.last`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As jinja2: an attribute, else an item, else undefined. A plain dict has no attributes but those of its class."""
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind is Namespace:
            value = obj._Namespace__attrs.get(attribute)
            if type(value) in _DATA and not attribute.startswith("_"):
                return value
        elif isinstance(obj, LoopContext) and attribute in _LOOP_NUMBERS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


_DICT_ATTRIBUTES = frozenset(dir(dict))
_DATA = frozenset({str, int, bool, list, dict})
_LOOP_NUMBERS = frozenset({"index", "index0", "first", "last"})


@functools.cache
def _shared_environment() -> ImmutableSandboxedEnvironment:
    return make_environment()


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return a new jinja2 environment: block trimming, extensions, filters and globals as transformers sets them."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


_JSON = json.JSONEncoder(ensure_ascii=False)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which models were never trained on.
    if not ensure_ascii and indent is None and separators is None and not sort_keys:
        return _JSON.encode(value)  # nearly every one: what json.dumps makes an encoder for each time
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    """Return the time of now in a strftime format."""
    # Local time, as the engine: router and workers must run in one time zone for templates that print the date.
    return datetime.now().strftime(format)


def _mark_end(message: dict[str, Any]) -> str:
    """Append CONTINUE_MARK to the text of `message` (its last text part for a list) and return that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CONTINUE_MARK
        return content
    if isinstance(content, list):
        for position in reversed(range(len(content))):
            part = content[position]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                marked = {**part, "text": part["text"] + CONTINUE_MARK}
                message["content"] = [*content[:position], marked, *content[position + 1 :]]
                return str(part["text"])
    raise PromptError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, continued: str) -> str:
    """Return `text` up to the mark; a template that trims messages also trims the text before it."""
    place = text.rfind(CONTINUE_MARK.strip())
    if place < 0 or continued.strip() not in text:
        raise PromptError("continue_final_message: the chat template does not print the last message as it is")
    return text[:place] if text.startswith(CONTINUE_MARK, place) else text[:place].rstrip()


def _takes_inline_system(source: str) -> bool:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    roles, mark = ("system", "user", "system", "user"), "sglfast_inline_system"  # small letters, as the engine's
    messages = [{"role": role, "content": mark if at == 2 else "t"} for at, role in enumerate(roles)]
    try:
        return mark in environment.from_string(source).render(messages=messages, add_generation_prompt=False)
    except Exception:  # what a template can raise is no matter here
        return False


def _content_format(source: str, tree: nodes.Template) -> ContentFormat:
    """Classify a template as SGLang 0.5.23 does (srt/parser/jinja_template_utils.py): does a loop walk over `content`?"""
    if any(word in source for word in MULTIMODAL_WORDS):
        return "openai"
    return "openai" if any(_is_content(loop.iter) for loop in tree.find_all(nodes.For)) else "string"


def _is_content(node: nodes.Node | None) -> bool:
    """Say whether an expression is `message.content` or `message['content']`, filtered, tested or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node)
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content" and _is_message(node.node)
    return isinstance(node, nodes.Getattr) and node.attr == "content" and _is_message(node.node)


def _is_message(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name in MESSAGE_VARIABLES
