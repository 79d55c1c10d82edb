"""Chat templates that do what those of well-known models do, in our own short words, and some that do what none should.

TEMPLATES: name -> source. MIDDLE: those whose plain conversations can be rendered from the middle; NEVER: those that are refused or
print what depends on the end of the conversation.
"""

# ruff: noqa: E501

from looking_templates import HARMONY as HARMONY
from looking_templates import LOOKS as LOOKS

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# A default system message, tools in it, calls, and answers of tools that stand together: looks at the neighbours by their index.
QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Help.' }}{%- endif %}
    {{- '\\n\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Looks for the last question from the end, and drops the thoughts of answers before it.
QWEN3 = """\
{%- set ns = namespace(looking=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == 'user' and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.looking = false %}{%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set thoughts = '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if thoughts and loop.index0 > ns.last_query %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

# As above, with calls and their answers, the thoughts of answers behind the last question, and a field of their own for them.
THINKER = """\
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + (messages[0].content if messages[0].role == 'system' else '') + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(looking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}{%- set thoughts = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set thoughts = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thoughts)) %}
            {{- '<|im_start|>assistant\\n<think>' + thoughts.strip('\\n') + '</think>' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<call>' + call.function.name + ' ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}
"""

# Looks for the last question from the front; a macro for texts.
FORWARD = """\
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}{%- for item in content -%}{{- item.text }}{%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1, questions=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {% set ns.last = loop.index0 -%}{%- set ns.questions = ns.questions + 1 -%}
    {%- endif %}
    {%- if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>{{ visible(m.content) }}{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith('/nothink')) else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set thoughts = '' %}{%- set content = visible(m.content) %}
{%- if m.reasoning_content is string %}{%- set thoughts = m.reasoning_content %}
{%- elif '</think>' in content %}{%- set thoughts = content.split('</think>') | first -%}{%- set content = content.split('</think>') | last -%}
{%- endif %}
{%- if loop.index0 > ns.last and thoughts -%}{{ '<think>' + thoughts.strip() + '</think>' }}{%- else -%}{{ '<think></think>' }}{%- endif -%}
{%- if content.strip() -%}{{ content.strip() }}{%- endif -%}
{%- else -%}{{ '<|' + m.role + '|>' + visible(m.content) }}{%- endif -%}<|im_end|>
{%- endfor -%}<|assistant|>"""

# Puts something before the last question, found from the end by its number.
LAST_BY_RANGE = """\
{%- set ns = namespace(last=-1) -%}
{%- for at in range(messages|length - 1, -1, -1) -%}
    {%- if messages[at]['role'] == 'user' and not messages[at].get('tool_calls') -%}{%- set ns.last = at -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if loop.index0 == ns.last -%}{{ '[the question]' }}{%- endif -%}
    {{ message.role ~ ': ' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor -%}>"""

# A header with the date, the system message apart, the rest walked over; macros.
LLAMA3 = """\
{{- bos_token }}
{%- macro header(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{%- endmacro %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul' %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- header('system') }}
{{- 'Today: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {{- 'Functions:\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or message.tool_calls) %}
        {{- header(message['role']) + message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- header('ipython') }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}
"""

# Roles must alternate; one loop.
MISTRAL = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""

# Checks all roles before it prints, and puts tools before the last question.
MISTRAL_TOOLS = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ('user', 'assistant') and not message.tool_calls %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == user_messages[-1] %}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{%- endif %}
        {%- if loop.last and system_message is defined %}{{- '[INST]' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# The system message goes before the first question; walks over parts of content.
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_prefix = '' -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception('bad content') }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

PHI3 = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}\
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}\
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# The generation prompt is printed in the last turn of the loop.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Collects the system messages first, carries a state from turn to turn, cuts thoughts.
DEEPSEEK = """\
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = message['content'] %}\
{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}\
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{ '<|User|>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{%- if ns.is_tool %}{{ '<|tool_outputs_end|>' + message['content'] + '<|end_of_sentence|>' }}{%- set ns.is_tool = false -%}\
{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{%- endif %}{%- endif %}\
{%- if message['role'] == 'tool' %}{%- if not ns.is_tool %}{{ '<|tool_outputs_begin|>' }}{%- set ns.is_tool = true -%}{%- endif %}\
{{ '<|tool_output_begin|>' + message['content'] + '<|tool_output_end|>' }}{%- endif %}{%- endfor -%}\
{% if ns.is_tool %}{{ '<|tool_outputs_end|>' }}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|>' }}{% endif %}"""

# The same state without the first pass.
STATEFUL = """\
{%- set ns = namespace(is_tool=false, turns=0, names=[]) -%}
{%- for message in messages -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- if message.role == 'tool' -%}
        {%- if not ns.is_tool -%}{{ '<|outputs|>' }}{%- set ns.is_tool = true -%}{%- endif -%}
        {%- set ns.names = ns.names + [message.name | default('?')] -%}
        {{ '<|output|>' + message.content }}
    {%- else -%}
        {%- if ns.is_tool -%}{{ '<|outputs_end ' + ns.names | join(',') + '|>' }}{%- set ns.is_tool = false -%}{%- endif -%}
        {{ '<|' + message.role + ' ' ~ ns.turns ~ '|>' + message.content }}
    {%- endif -%}
    {{ '<|im_end|>\\n' }}
{%- endfor -%}
{{ ns.turns }}{{ '<|open|>' if ns.is_tool else '<|assistant|>' }}
"""

# Looks at the neighbours with `loop`.
NEIGHBOURS = """\
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>tool\\n' }}{%- endif -%}
        {{ '<r>' ~ message.content ~ '</r>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
    {%- else -%}
        {{ '<|im_start|>' ~ message.role ~ ' after ' ~ (loop.previtem.role if not loop.first else 'none') ~ '\\n' }}
        {{- message.content ~ '<|im_end|>\\n' }}
    {%- endif -%}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' }}"""

COMMAND_R = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% if system_message != false %}{{ '<|START|><|SYSTEM|>' + system_message + '<|END|>' }}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}{% endif %}\
{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|START|><|USER|>' + content.strip() + '<|END|>' }}\
{% elif message['role'] == 'assistant' %}{{ '<|START|><|BOT|>' + content.strip() + '<|END|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START|><|BOT|>' }}{% endif %}"""

# Another loop and another system prompt for tools; the loop stands inside a branch.
GRANITE = """\
{%- if tools %}
    {{- '<|role|>available_tools\\n' + tools | tojson(indent=2) + '<|end|>\\n' }}
    {%- for message in messages %}{{- '<|role|>' + message.role + '<|t|>' + message.content + '<|end|>\\n' }}{%- endfor %}
{%- else %}
    {%- for message in messages -%}
        {%- if message['role'] == 'system' %}{{- '<|role|>system<|x|>' + message['content'] + '<|end|>\\n' }}
        {%- else %}{{- '<|role|>' + message['role'] + '<|x|>' + message['content'] + '<|end|>\\n' }}{%- endif %}
        {%- if loop.index > 30 %}{% break %}{% endif %}
    {%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}{{- '<|role|>assistant<|x|>' }}{%- endif %}
"""

# A macro that keeps count in a namespace, called before the loop and in it; prints whole messages.
COUNTING_MACRO = """\
{%- set ns = namespace(n=0) -%}
{%- macro say(text) -%}{%- set ns.n = ns.n + 1 -%}{{ ns.n ~ ': ' ~ text ~ '<|im_end|>\\n' }}{%- endmacro -%}
{{ say('begin') }}
{%- for message in messages -%}{{ say(message.role ~ ' says ' ~ message.content) }}{%- endfor -%}{{ say('end') }}"""

MACRO_AS_VALUE = """\
{%- set ns = namespace(n=0) -%}{%- macro items() -%}{%- set ns.n = ns.n + 1 -%}{{ ns.n }}{%- endmacro -%}
{%- set box = namespace(items=items) -%}{{ box.items() }}{% for m in messages %}{{ m.content ~ ns.n }}<|im_end|>{% endfor %}"""
WHOLE_MESSAGES = "{% for m in messages %}{{ m | tojson }}<|im_end|>\n{% endfor %}{{ messages | length }}"
GENERATION = """{% for message in messages %}{{ '<|' + message.role + '|>' }}{% generation %}{% set x = message.content %}{{ x }}{% endgeneration %}\
{{ x | default('') }}<|im_end|>
{% endfor %}<|assistant|>"""
CLOCK = "{{ strftime_now('%Y') }}{% for m in messages %}{{ strftime_now('%j') ~ m.role ~ ': ' ~ m.content }}<|im_end|>\n{% endfor %}>"
LENGTH_FIRST = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
REVERSED_INDEX = "{% for m in messages %}{{ loop.revindex ~ m.content }}<|im_end|>{% endfor %}"
LAST_FIRST = "{{ messages[-1].content }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
ITERATOR = (
    "{% set roles = messages | map(attribute='role') %}{% for m in messages %}{{ roles | first }}{{ m.content }}<|im_end|>{% endfor %}"
)
TOOL_ITERATOR = """{% set names = (tools or [{'type': 'a'}, {'type': 'b'}]) | map(attribute='type') %}\
{% for m in messages %}{{ names | first }}{{ m.content }}<|im_end|>{% endfor %}"""
CYCLER = "{% set c = cycler('a', 'b', 'c') %}{% for m in messages %}{{ c.next() ~ m.content }}<|im_end|>{% endfor %}"
JOINER = "{% set j = joiner('; ') %}{% for m in messages %}{{ j() ~ m.content }}<|im_end|>{% endfor %}"
CHANGED = "{% for m in messages %}{% if loop.changed(m.role) %}[{{ m.role }}]{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
CYCLE = "{% for m in messages %}{{ loop.cycle('odd', 'even') ~ m.content }}<|im_end|>\n{% endfor %}"
CHANCE = "{% for m in messages %}{{ [m.role, m.content] | random }}<|im_end|>{% endfor %}"
FILTERED = "{% for m in messages if m.role != 'tool' %}{{ loop.index ~ m.content }}<|im_end|>{% endfor %}"
ELSE = "{% for m in messages %}{{ m.content }}<|im_end|>{% else %}nobody{% endfor %}"
NESTED = "{% for x in [1, 2] %}{% for m in messages %}{{ x ~ m.content }}<|im_end|>{% endfor %}{% endfor %}"
TWICE = "{% for m in messages %}{{ m.role }},{% endfor %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
BUFFERED = "{% filter upper %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% endfilter %}"
REMEMBERED = """{% set ns = namespace(last='', all='') %}{% for m in messages %}{{ m.content ~ ' after ' ~ ns.last }}<|im_end|>
{% set ns.last = m.content %}{% set ns.all = ns.all ~ m.role %}{% endfor %}{{ ns.all }}"""
REMEMBERS_MESSAGES = """{% set ns = namespace(last=none) %}{% for m in messages %}{{ m.content ~ (ns.last.role if ns.last else '') }}<|im_end|>
{% set ns.last = m %}{% endfor %}"""
LEAKS = """{% for m in messages %}{% if m.role == 'user' %}{% set seen = 'yes' %}{% endif %}{{ seen | default('no') ~ m.content }}<|im_end|>
{% endfor %}{{ seen | default('never') }}"""

TEMPLATES = {name.lower(): value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str)}
MIDDLE = [
    *("chatml", "qwen25", "llama3", "mistral", "gemma", "gemma3", "phi3", "zephyr", "stateful", "neighbours", "command_r", "granite"),
    *("counting_macro", "whole_messages", "generation", "clock", "cycle", "remembered", "leaks", "twice"),
    *("qwen3", "thinker", "forward", "last_by_range", "deepseek", "harmony", "looks", "macro_as_value"),
]
NEVER = [
    *("mistral_tools", "length_first", "reversed_index", "last_first", "iterator", "tool_iterator", "cycler", "joiner"),
    *("changed", "chance", "filtered", "else", "nested", "buffered"),
]
