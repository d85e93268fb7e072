"""Chat templates in the manner of released ones, and what transformers makes of them.

`RECORDED` is compared with transformers by tests/interop/test_chat_parity.py, and with this library
wherever the tests run.
"""

BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'

# Each with the special tokens that it needs besides.
TEMPLATES = {
  # Words alone, as DeepSeek LLM and V2.
  'words': (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] "
    "+ '\\n\\n' }}{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    (),
  ),
  # Special tokens, as DeepSeek V3, which writes the system message first wherever it stands.
  'tokens': (
    "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' and m.content is not none %}{{ '<｜Assistant｜>' ~ m.content ~ "
    "eos_token }}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}"
    '{% endif %}',
    ('<｜User｜>', '<｜Assistant｜>'),
  ),
  # Lines, whose blocks stand indented on lines of their own; a line end behind each end of turn.
  'lines': (
    """{# Turns between tokens. #}
{% for m in messages %}
  {% if m.role not in ('system', 'user', 'assistant') %}
    {{ raise_exception('no role ' + m.role) }}
  {% endif %}
  {% if loop.index > 90 %}{% break %}{% endif %}
<|start|>{{ m.role }}
  {% if m.role == 'assistant' %}
    {% generation %}{{ m.content | trim }}{{ '<|end|>\n' }}{% endgeneration %}
  {% elif tools is none %}
{{ m.content | trim | tojson }}<|end|>
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}
""",
    ('<|start|>', '<|end|>'),
  ),
}

CHAT = [
  {'role': 'system', 'content': 'Be "brief" <ä>.'},
  {'role': 'user', 'content': 'What is 7 + 5?'},
  {'role': 'assistant', 'content': '12'},
  {'role': 'user', 'content': " And\n'8'? "},
  {'role': 'assistant', 'content': ' 13 好'},
]

# What transformers writes: up to the first answer, that answer, what leads to the next, and it.
RECORDED = {
  'words': (
    '<｜begin▁of▁sentence｜>Be "brief" <ä>.\n\nUser: What is 7 + 5?\n\nAssistant:',
    ' 12<｜end▁of▁sentence｜>',
    "User:  And\n'8'? \n\nAssistant:",
    '  13 好<｜end▁of▁sentence｜>',
  ),
  'tokens': (
    '<｜begin▁of▁sentence｜>Be "brief" <ä>.<｜User｜>What is 7 + 5?<｜Assistant｜>',
    '12<｜end▁of▁sentence｜>',
    "<｜User｜> And\n'8'? <｜Assistant｜>",
    ' 13 好<｜end▁of▁sentence｜>',
  ),
  'lines': (
    '<|start|>system\n"Be \\"brief\\" <ä>."<|end|>\n<|start|>user\n"What is 7 + 5?"<|end|>\n'
    '<|start|>assistant\n',
    '12<|end|>\n',
    '<|start|>user\n"And\\n\'8\'?"<|end|>\n<|start|>assistant\n',
    '13 好<|end|>\n',
  ),
}
