"""Chat templates that look ahead in their loop over the messages, in our own short words."""

# ruff: noqa: E501

# Prints the thoughts before a call as long as no answer follows, which it looks for behind each call; the date, and macros for tools.
HARMONY = """\
{%- macro type_of(spec) -%}
    {%- if spec.type == 'array' -%}{{- (type_of(spec['items']) if spec['items'] else 'any') + '[]' }}
    {%- elif spec.type == 'object' and spec.properties -%}
        {{- '{' }}
        {%- for name, inner in spec.properties.items() -%}
            {{- name + ('' if name in (spec.required or []) else '?') + ': ' }}{{ type_of(inner) }}{%- if not loop.last -%}{{- ', ' }}{%- endif -%}
        {%- endfor -%}
        {{- '}' }}
    {%- else -%}{{- spec.type or 'any' }}{%- endif -%}
{%- endmacro -%}
{%- macro functions(tools) -%}
    {%- for tool in tools %}{%- set tool = tool.function %}{{- 'type ' + tool.name + ' = ' + type_of(tool.parameters) + ';\\n' }}{%- endfor %}
{%- endmacro -%}
{%- macro header() -%}
    {%- if model_identity is not defined %}{%- set model_identity = 'You are a model.' %}{%- endif %}
    {{- model_identity + '\\nDate: ' + strftime_now('%Y-%m-%d') + '\\n' }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
    {{- 'Reasoning: ' + reasoning_effort }}
    {%- if builtin_tools %}
        {%- set builtin = namespace(browser=false) %}
        {%- for tool in builtin_tools %}{%- if tool == 'browser' %}{%- set builtin.browser = true %}{%- endif %}{%- endfor %}
        {{- '\\nBrowser.' if builtin.browser }}
    {%- endif -%}
    {%- if tools -%}{{- '\\nCalls go to functions.' }}{%- endif -%}
{%- endmacro -%}
{{- '<|im_start|>system\\n' }}
{{- header() }}
{{- '<|im_end|>' }}
{%- if messages[0].role == 'developer' or messages[0].role == 'system' %}
    {%- set developer_message = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = '' %}{%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- '<|im_start|>developer\\n' + developer_message }}{%- if tools -%}{{- functions(tools) }}{%- endif -%}{{- '<|im_end|>' }}
{%- endif %}
{%- set last_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if 'content' in message and '</think>' in message.content %}{{- raise_exception('thoughts have a field of their own') }}{%- endif %}
        {%- if 'tool_calls' in message %}
            {%- set future = namespace(found=false) %}
            {%- for other in loop_messages[loop.index:] %}
                {%- if other.role == 'assistant' and 'tool_calls' not in other %}
                    {%- set future.found = true %}
                {%- endif %}
            {%- endfor %}
            {%- set call = message.tool_calls[0] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {%- if message.content and message.thinking %}{{- raise_exception('one of them') }}
            {%- elif message.content and not future.found %}{{- '<|im_start|>assistant thinks\\n' + message.content + '<|im_end|>' }}
            {%- elif message.thinking and not future.found %}{{- '<|im_start|>assistant thinks\\n' + message.thinking + '<|im_end|>' }}
            {%- endif %}
            {{- '<|im_start|>assistant to=' + call.name + '\\n' + call.arguments | tojson + '<|im_end|>' }}
            {%- set last_call.name = call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {{- '<|im_start|>assistant\\n' + message.content + '<|return|>' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>' }}
            {%- set last_call.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_call.name is none %}{{- raise_exception('nobody called') }}{%- endif %}
        {{- '<|im_start|>' + last_call.name + ' to=assistant\\n' + message.content | tojson + '<|im_end|>' }}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{%- endif -%}
"""

# Looks ahead for several things, reads what it finds once or later, and keeps it.
LOOKS = """\
{%- set kept = namespace(asked=false, n=0) -%}
{%- for m in messages -%}
    {%- set a = namespace(tool=false, user=false, any=false) -%}
    {%- for x in messages[loop.index + 1:] -%}{%- if x.role == 'tool' -%}{%- set a.tool = true -%}{%- endif -%}{%- endfor -%}
    {%- for x in messages[loop.index:] -%}{%- if x.role == 'user' and x.content -%}{%- set a.user = true -%}{%- endif -%}{%- endfor -%}
    {%- for x in messages -%}{%- if x.role == 'system' -%}{%- set a.any = true -%}{%- endif -%}{%- endfor -%}
    {%- if m.role == 'tool' and not a.tool -%}[the last tool]{%- endif -%}
    {%- if m.role == 'assistant' and (a.user or 'x' in m.content) -%}[before a question]{%- endif -%}
    {%- if m.role == 'system' and a.any -%}[a system message]{%- endif -%}
    {%- if m.role == 'user' and kept.asked is boolean -%}{%- set kept.n = kept.n + (1 if a.tool is true else 2) -%}{%- endif -%}
    {{ kept.n ~ m.role ~ ': ' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor -%}>"""
