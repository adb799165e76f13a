"""Chat templates: what transformers renders, and nothing that exceeds the bounds."""

import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from specjax.text import chat
from specjax.text.tokenizer import Tokenizer

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# fmt: off
LLAMA31 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n        "
    '{%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n        {%- set date_string = "26 Jul 2024" '
    "%}\n    {%- endif %}\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
    "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n"
    "    {%- set system_message = "
    '"" %}\n{%- endif %}\n{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{{- "Today Date: " + '
    'date_string + '
    '"\\n\\n" }}\n{{- system_message }}\n{{- "<|eot_id|>" }}\n{%- for message in messages %}\n    {{- '
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif "
    "%}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == "
    "'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + "
    "role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n        {{- \"\\n\" }}\n"
    "        "
    "{{- tool | tojson }}\n    {%- endfor %}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n        {{- "
    "'<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n        {{- "
    "'<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n    "
    '{%- endif %}\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role '
    '== "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}\n        {{- '
    "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor "
    "%}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# fmt: on
OTHERS = {
    "loop controls": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[0].items() | list }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
}
TEMPLATES = {"SmolLM2": SMOLLM2, "Llama 3": LLAMA3, "Llama 3.1": LLAMA31, "Gemma": GEMMA, "Qwen2.5": QWEN25, **OTHERS}
USER = {"role": "user", "content": " Wie geht's? <b>\"\u20ac\U0001f642\n\x00"}
CHATS = {
    "user": [USER],
    "turns": [USER, {"role": "assistant", "content": "Gut."}, {"role": "user", "content": "So?"}],
    "system": [{"role": "system", "content": "Sei knapp."}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "x", "reasoning": "y"}, USER],
    "nothing": [],
}
VARIABLES: Any = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(name):
    for messages in CHATS.values():
        wanted = None
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=TEMPLATES[name], add_generation_prompt=True, **VARIABLES
            )
            wanted = rendered[0]
        except Exception:
            with pytest.raises(ValueError, match="a template does not take these messages"):
                chat.render(TEMPLATES[name], messages, name="a template", variables=VARIABLES)
        if wanted is not None:
            assert chat.render(TEMPLATES[name], messages, name="a template", variables=VARIABLES) == wanted


DOUBLING = "{% set ns = namespace(x=SEED) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x DO }}"


def doubling(seed, step, do=""):
    return DOUBLING.replace("SEED", seed).replace("STEP", step).replace("DO", do)


LOOPS = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
FAILS = r"does not take these messages \("
MEMORY = r"takes more than (128 MiB of memory|1 seconds)"  # whichever a busy machine meets first
HOSTILE = {
    "long range": ("{% for i in range(10**9) %}x{% endfor %}", FAILS + "OverflowError: Range too big"),
    "nested loops": (LOOPS, MEMORY),
    "nested filters": ("{{ range(99999)|map('center', 99999)|list|length }}", MEMORY),
    "product of a text": ("{{ 'x' * 10**10 }}", MEMORY),
    "product of a list": ("{{ ([1] * 10**10)|length }}", MEMORY),
    "product of a text within the memory": ("{{ 'x' * 20000000 }}", "makes a text of 20000000 characters"),
    "power": ("{{ 10**(10**10) }}", MEMORY + "|does not take these messages"),
    "powers of powers": ("{{ (7**(9**9))**9 % 3 }}", MEMORY),
    "division by zero": ("{{ 1/0 }}", FAILS + "ZeroDivisionError: division by zero"),
    "include": ("{% include 'passwd' %}", FAILS + "TypeError: no loader"),
    "import": ("{% import '/etc/passwd' as x %}", FAILS),
    "extends": ("{% extends 'x' %}", FAILS),
    "a text that doubles": (doubling("'ab'", "ns.x ~ ns.x"), MEMORY),
    "joins that double": (doubling("'ab'", "[ns.x, ns.x]|join"), MEMORY),
    "a shared list": (doubling("[1]", "[ns.x, ns.x]", "|string|length"), MEMORY),
    "a shared list as JSON": (doubling("[1]", "[ns.x, ns.x]", "|tojson|length"), MEMORY),
    "center": ("{{ 'x'|center(10**10) }}", MEMORY),
    "ljust": ("{{ 'x'.ljust(10**10) }}", MEMORY),
    "zfill": ("{{ 'x'.zfill(10**10) }}", MEMORY),
    "indent": ("{{ 'x'|indent(10**10, true) }}", MEMORY),
    "expandtabs": ("{{ '\t'.expandtabs(2*10**9) }}", MEMORY),
    "percent": ("{{ '%1000000000d' % 1 }}", MEMORY + "|makes a text"),
    "percent of a float": ("{{ '%.1000000000f' % 1 }}", MEMORY + "|does not take"),
    "format filter": ("{{ '%2000000000d'|format(1) }}", MEMORY),
    "format": ("{{ '{:>2000000000}'.format(1) }}", MEMORY),
    "format of arguments": ("{{ '{:>{}}'.format(1, 2*10**9) }}", MEMORY),
    "replace": ("{{ ('x' * 10**6)|replace('', 'x' * 10**6) }}", MEMORY),
    "join": ("{{ range(99999)|join('x' * 10**6) }}", MEMORY),
    "lipsum": ("{{ lipsum(n=10**9) }}", MEMORY),
    "strftime": ("{{ strftime_now('%A' * 10**8)|length }}", MEMORY + "|does not take"),
    "slices": ("{{ range(99999)|slice(10**9)|list|length }}", MEMORY),
    "batches": ("{{ range(9)|batch(10**10, 1)|list|length }}", MEMORY),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", FAILS + "RecursionError"),
    "nested parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", FAILS),
    "nested blocks": ("{% if 1 %}" * 500 + "{% endif %}" * 500, FAILS),
    "broken syntax": ("{% for %}", FAILS + "TemplateSyntaxError"),
    "an unknown filter": ("{{ 1|nothing }}", FAILS + "TemplateAssertionError"),
    "an undefined name": ("{{ nothing.at.all }}", FAILS + "UndefinedError"),
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__()|length }}", FAILS + "SecurityError"),
    "a refusal": ("{{ raise_exception('no') }}", FAILS + "TemplateError: no"),
    "a long template": ("x" * (chat.MAX_TEMPLATE + 1), "has 1048577 characters, and at most 1048576 are read"),
}


@pytest.fixture(scope="module")
def little_memory():
    """A process with an eighth of the memory, which is full sooner."""
    with pytest.MonkeyPatch.context() as patch:
        chat._close()
        patch.setattr(chat, "MAX_MEMORY", 2**27)
        yield
        chat._close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_sentence(name, little_memory):
    template, message = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"^The template of m\.gguf ({message})") as caught:
        chat.render(template, [USER], name="The template of m.gguf", variables={}, max_seconds=1)
    assert time.monotonic() - began < 30
    assert len(str(caught.value)) < 800


def test_threads_render_at_once_and_a_hostile_one_harms_nobody():
    said = {}

    def render(number):
        template = LOOPS if number == 3 else f"{number} {{{{ messages[0].content }}}}"
        try:
            said[number] = chat.render(template, [{"content": "a"}], name="It", variables={}, max_seconds=2)
        except ValueError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.pop(3).startswith("It takes more than 2 seconds")
    assert said == {i: f"{i} a" for i in range(8) if i != 3}


def test_messages_that_are_no_json():
    with pytest.raises(ValueError, match="not JSON values"):
        chat.render("x", [{"role": "user", "content": object()}], name="It", variables={})
    assert chat.render("x", [], name="It", variables={}) == "x"


def test_the_process_ends_with_the_one_that_started_it():
    program = (
        "from specjax.text import chat; import os\n"
        "print(chat.render('x', [], name='It', variables={}), chat._workers[os.getpid()]._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, pid = done.stdout.split()
    assert (text, done.stderr) == ("x", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_tokenizers_name_their_template(tmp_path):
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "merges": [], "chat_template": "{{ 1/0 }}"}
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, path="some/m.gguf")
    with pytest.raises(ValueError, match=r"^The chat template of some/m\.gguf does not take .*division by zero"):
        tokenizer.chat([USER])
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=rf"^The chat template of {tmp_path} does not take .*division by zero"):
        Tokenizer.from_directory(tmp_path).chat([USER])
