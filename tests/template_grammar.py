"""Chat templates that nobody has written, and conversations that go on, of a `random.Random`: equal seeds make equal ones.

Most of what a template here does is what those of models do: flags that a scan of the conversation sets, questions about neighbours,
the first and the last message, loops over a rest; only not in the order that anybody would think of. Some raise an error, as theirs do.
"""

import re
from collections.abc import Iterator
from random import Random
from typing import Any

ROLES = ["user", "assistant", "system", "tool", "note"]
TEXTS = [
    "", "q", "x", "xy hm", "hm", "é ü", " sp ", "<think>a</think>b", "<tool_response>1</tool_response>", "the quick brown fo", "words 7",
    "the words of this message are known to all " * 4,
]  # fmt: skip
ARGUMENTS = ["{}", '{"a": 1}', '{"b": ["x", {"c": "é\\n"}], "a": null}', '{"path": "the quick brown fox"}']
Message = dict[str, Any]
Conversation = list[Message]


def _over(names: str, production: str) -> list[str]:
    """The production once for each name of a loop's variable, which it calls ITEM."""
    return [production.replace("ITEM", name) for name in names.split()]


# Rules by name: `$rule` stands for one of its productions by chance, `$rule(x)` for one with x for its `$_`. `$_` of the same production is
# the same everywhere; what a rule likes better stands in it more than once. The expected size is finite: few productions grow.
RULES: dict[str, list[str]] = {
    "template": ["$macros$state$before$loop$after"],
    "macros": [
        "{% macro mac(z) %}{{ 'M' if z }}{% endmacro %}{% macro put(z) %}{{ z }}{{ messages[0].role }}{% endmacro %}$setter",
    ],
    "setter": ["{% macro seta(z) %}{% set ns.a = z %}{% endmacro %}", *["{% macro seta(z) %}{% endmacro %}"] * 4],
    "state": [
        "{% set ns = namespace(a=$bool, b=false, c=false, n=0) %}{% set k = namespace(a=false, b=true, c=false) %}"
        "{% set loop_messages = messages %}",
    ],
    "before": ["", *["$outer" * count for count in range(1, 5)]],
    "loop": ["{% for m in $all %}{% set t = namespace(a=false, b=false) %}$body$message{% endfor %}"],
    "all": ["messages", "messages", "loop_messages"],
    "body": ["$inner" * count for count in range(1, 6)],
    "message": [
        "{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "{{ m.content }}\n",
        "{% if $inner_condition %}{{ m.content }}{% endif %}<|im_end|>",
        "{% if $question(m) %}{{ m.content }}<|im_end|>{% endif %}",
    ],
    "after": ["", "{{ 'G' }}", "<|im_start|>assistant\n", "$outer"],
    # ---- small things ----
    "bool": ["true", "false"],
    "role": ROLES,
    "namespace": ["ns", "ns", "k"],
    "flag": ["$namespace.a", "$namespace.b", "$namespace.c"],
    "flag_of_ns": ["ns.a", "ns.b", "ns.c"],
    "digit": list("01234"),
    "letter": list("pqrs"),
    # ---- questions ----
    "any_tool": ["tools", "tools[0].name", "tools[0].function.name", "tools and tools[0].function.strict", "tools[1] is defined"],
    "calls": [
        "$_.tool_calls", "$_.tool_calls is iterable", "($_.tool_calls and $_.tool_calls[0].function.name == 'f')",
        "($_.tool_calls and $_.tool_calls[0].function.arguments)", "($_.tool_calls and $_.tool_calls[0].function.arguments is mapping)",
        "($_.tool_calls and $_.tool_calls[0].function.arguments is string)", "($_.tool_calls and $_.tool_calls | length > 1)",
        "$_.tool_call_id == '1'", "$_.tool_call_id is defined", "$_.tool_calls[0].function.name is defined",
    ],
    "role_question": ["$_.role == '$role'", "$_['role'] != '$role'"],
    "question": [
        *["$role_question($_)"] * 2, "$_.content", "'tool_calls' in $_", "$_.tool_calls", "$_.reasoning_content is string",
        "$_.content.startswith('x')", "$_.content.startswith('<tool_response>')", "$role_question($_) and $question($_)",
        *["$calls($_)"] * 2, "not $question($_)", "$_.content is defined", "'hm' in $_.content", "$_.nope is defined",
        "$_.get('reasoning_content')",
    ],
    "condition": [
        "$flag", "not $flag", "messages[0].role == '$role'", "$any_tool", "tools | length > 1", "$flag is true", "$flag and $flag",
        "add_generation_prompt",
    ],
    "outer_condition": [
        *["$condition"] * 6, "messages | length > 3", "$question(messages[-1])", "$question(messages[0])", "ns.n > 1",
        "messages | selectattr('role', 'equalto', '$role') | list", "messages[1] is defined",
        "messages[1] is defined and $question(messages[1])",
    ],
    "inner_condition": [
        *["$condition"] * 6, *["$question(m)"] * 3, "loop.first", "loop.last", "loop.index0 $order ns.n", "loop.index0 $order $digit",
        "t.a", "not t.b", "t.a and not t.b", "(loop.previtem and $question(loop.previtem))", "(loop.nextitem and $question(loop.nextitem))",
        "messages[loop.index] is defined and $question(messages[loop.index])", "$question(messages[loop.index0])",
    ],
    "order": [">", "<", ">=", "=="],
    # ---- what is printed ----
    "print": ["'$letter'", "$flag", "ns.n", "put('u')", "strftime_now('%Y')"],
    "tools_print": [
        "tools | tojson", "tools | tojson(indent=2) if tools", "tools[0] | tojson if tools", "tools[0].name if tools",
        "tools[0].name + '!' if tools", "tools[0].function.name + '!' if tools", "tools | length if tools",
        "tools | map(attribute='function') | map(attribute='name') | join if tools",
    ],
    "outer_print": [
        *["$print"] * 5, *["$tools_print"] * 2, "'$letter' if $outer_condition else ''", "mac($outer_condition)", "seta($outer_condition)",
        "messages | selectattr('role', 'equalto', '$role') | map(attribute='content') | join('|')", "'z' if $question(messages[-1])",
        "messages | length", "messages[0].content", "raise_exception('no') if $question(messages[0])", "{'k': 'é'} | tojson",
    ],
    "calls_print": [
        "m.tool_calls[0].function.name", "'to ' + m.tool_calls[0].function.name + ':'", "m.tool_calls[0].function.arguments | tojson",
        "m.tool_calls[0].function.arguments", "m.tool_calls[0].function | tojson", "m.tool_calls[0] | tojson", "m.tool_call_id",
        "{'n': m.tool_calls[0].function.name, 'a': m.tool_calls[0].function.arguments} | tojson", "m.tool_calls[0].id ~ ' ' ~ ns.a",
        "m.tool_calls[0].function.arguments.a", "m.tool_calls[0].function.arguments | tojson(indent=1)", "m.content.lstrip('x')",
    ],
    "inner_print": [
        *["$print"] * 4, "$tools_print", *["$calls_print if m.tool_calls"] * 4, "'$letter' if $inner_condition else ''",
        "mac($inner_condition)", "seta($inner_condition)",
        *["m.content"] * 2, "m.content | trim", "m.role + '\\n'", "m.role + '\\n' + m.content", "(m.reasoning_content or '')",
        "m.content | tojson", "loop.index0", "m.tool_calls | tojson if m.tool_calls", "'y' if t.a else 'n'", "t.b", "loop.cycle('A', 'B')",
    ],
    # ---- statements around the loop ----
    "outer": [
        *["{{ $outer_print }}"] * 2, "txt ", "{% set $flag = $outer_value %}", "{% set $flag = false %}", "{% set ns.n = $outer_number %}",
        *["{% for tool in tools or [] %}{{ $tool_print }}{% endfor %}"] * 2,
        "{% for tool in tools or [] %}{% if tool.function.strict %}{% set $flag = true %}{% endif %}{% endfor %}",
        "$outer_look($flag)", *["{% if $outer_condition %}$outer_few$outer_else{% endif %}"] * 2, "$outer_scan", "$backward_scan",
        "{% set loop_messages = $loop_messages %}",
    ],
    "tool_print": [
        "tool | tojson", "tool.function.name", "(tool.function or tool).name ~ loop.index", "tool.name + '!'", "messages[0].role",
    ],
    "outer_few": ["$outer", "$outer$outer"],
    "outer_else": ["", "{% else %}$outer", "{% elif $outer_condition %}$outer"],
    "outer_value": ["$bool", "$bool", "$outer_condition", "'w'"],
    "outer_number": ["0", "2", "ns.n + 1", "messages | length - 1", "(messages | length) - 2"],
    "outer_part": [
        *["messages"] * 3, "messages[1:]", "messages[2:]", "messages[:-1]", "loop_messages", "messages[::-1]", "messages | reverse",
        "(messages | selectattr('role', 'equalto', 'user'))",
    ],
    "loop_messages": ["messages", "messages[1:]"],
    "outer_look": _over("x m message", "{% for ITEM in $outer_part %}{% if $question(ITEM) %}{% set $_ = true %}{% endif %}{% endfor %}"),
    "outer_scan": [
        "{% for x in $outer_part %}{{ x.content }}{% endfor %}",
        *["{% for x in $outer_part %}{% if $question(x) %}$scanned{% endif %}{% endfor %}"] * 2,
    ],
    "scanned": ["{% set $flag = true %}", "{{ x.role }}", "{% set ns.n = loop.index0 %}", "{{ x.content }}"],
    "backward_scan": [
        "{% for x in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}{% if $flag_of_ns and $question(x) %}"
        "{% set $flag_of_ns = false %}{% set ns.n = i %}{% endif %}{% endfor %}",
        "{% for x in messages[::-1] %}{% if $question(x) %}{% set ns.n = messages | length - 1 - loop.index0 %}{% break %}"
        "{% endif %}{% endfor %}",
    ],
    # ---- statements in the loop ----
    "inner": [*["$inner_plain"] * 8, *["{% if $inner_condition %}$inner_few$inner_else{% endif %}"] * 2, *["$inner_look(t.$t_flag)"] * 3],
    "inner_plain": [
        *["{{ $inner_print }}"] * 2, "txt ", "{% set $flag = $inner_value %}", "{% set $flag = false %}", "{% set ns.n = $inner_number %}",
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}",
        "{% if m.tool_calls %}{% set $flag = m.tool_calls[0].function.name %}{% endif %}",
        "$inner_look($flag)", "{% set v = $inner_condition %}{{ 'v' if v }}",
    ],
    "inner_few": ["$inner$jump", "$jump$inner$inner"],
    "inner_else": ["", "{% else %}$inner", "{% elif $inner_condition %}$inner"],
    "inner_value": ["$bool", "$bool", "$inner_condition", "'w'"],
    "inner_number": ["0", "2", "ns.n + 1", "loop.index0", "m.content | length"],
    "inner_part": [
        *["messages[loop.index:]"] * 2, "messages[loop.index + 1:]", "messages[loop.index0:]", "messages", "messages[1:]",
        "loop_messages[loop.index:]", "messages[loop.index0:][1:]", "messages[:loop.index0]", "messages[-1:]",
    ],
    "inner_look": _over("x m message", "{% for ITEM in $inner_part %}{% if $question(ITEM) %}{% set $_ = true %}{% endif %}{% endfor %}"),
    "t_flag": ["a", "b"],
    "jump": ["{% continue %}", "{% break %}", "{{ raise_exception('bad') }}", *[""] * 20],
}  # fmt: skip

_RULE = re.compile(r"\$([a-z]\w*)(?:\(([^()]*)\))?")


class Grammar:
    """What a `random.Random` says: templates and conversations."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def template(self) -> str:
        """The source of a chat template that loops over `messages`; it may fail, with any error of Jinja or of itself."""
        return self._expand("$template")

    def bodies(self) -> Iterator[dict[str, Any]]:
        """`conversations` with tools, most of them with the same."""
        random = self._random
        offers = [[self._tool() for _ in range(count)] for count in (1, 2, 3)] + [[], None]
        offer = random.choice(offers)
        for messages in self.conversations():
            if random.random() < 0.15:
                offer = random.choice(offers)
            yield {"messages": messages} if offer is None else {"tools": offer, "messages": messages}

    def conversations(self, count: int = 26) -> Iterator[Conversation]:
        """Conversations that go on where one of the last few stood, whole or cut, or with another first message; often as the last did."""
        random = self._random
        known = [[self._message()], [self._user()]]
        more: Conversation = []
        for _ in range(count):
            messages = random.choice(known[-5:])
            if random.random() < 0.25:
                messages = messages[: random.randint(1, len(messages))]
            if random.random() < 0.12:
                messages = [{**messages[0], "content": random.choice(TEXTS)}, *messages[1:]]
            if random.random() < 0.5:
                more = [self._retold(message) for message in more]
            else:
                more = [self._message() if random.random() < 0.5 else self._user() for _ in range(random.randint(0, 3))]
                if random.random() < 0.4:
                    more = [*more[:1], *self._round()]
            messages = [*messages, *more]
            known.append(messages if len(messages) <= 12 else messages[:3])
            yield known[-1]

    def _expand(self, text: str, argument: str = "") -> str:
        """The text with a production in each rule's place. Arguments are expanded first, so that they are the same all over one."""
        return _RULE.sub(self._production, text.replace("$_", argument))

    def _production(self, found: re.Match[str]) -> str:
        rule, argument = found.groups()
        return self._expand(self._random.choice(RULES[rule]), self._expand(argument or ""))

    def _retold(self, message: Message) -> Message:
        calls = {"tool_calls": [self._call() for _ in message["tool_calls"]]} if "tool_calls" in message else {}
        return {**message, "content": self._random.choice(TEXTS), **calls}

    def _user(self) -> Message:
        return {"role": self._random.choice(["user", "tool"]), "content": self._random.choice(TEXTS)}

    def _message(self) -> Message:
        random = self._random
        message: Message = {"role": random.choice(ROLES[:4]) if random.random() < 0.9 else "note", "content": random.choice(TEXTS)}
        if message["role"] == "assistant" and random.random() < 0.35:
            message |= self._calls()
        if message["role"] == "assistant" and random.random() < 0.2:
            message["reasoning_content"] = random.choice(TEXTS)
        if message["role"] == "tool" and random.random() < 0.7:
            message["tool_call_id"] = random.choice(["1", "2"])
        return message

    def _calls(self) -> Message:
        return {"tool_calls": [self._call() for _ in range(self._random.choice([1, 1, 1, 2]))]}

    def _round(self) -> Conversation:
        """A call and its answers."""
        random = self._random
        answers = [{"role": "tool", "tool_call_id": "1", "content": random.choice(TEXTS)} for _ in range(random.choice([1, 1, 2]))]
        return [{"role": "assistant", "content": random.choice(["", *TEXTS]), **self._calls()}, *answers]

    def _call(self) -> dict[str, Any]:
        random = self._random
        function = {"name": random.choice("fgh"), "arguments": random.choice(ARGUMENTS)}
        return {"id": random.choice(["1", "2"]), "type": "function", "function": function}

    def _tool(self) -> dict[str, Any]:
        random = self._random
        function: dict[str, Any] = {"name": random.choice("fgh"), "description": random.choice(TEXTS), "parameters": {"type": "object"}}
        if random.random() < 0.5:
            function["strict"] = random.random() < 0.5
        return {"type": "function", "function": function}
