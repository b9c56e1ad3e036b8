"""Modelfiles: a template only where it gives what the chat template gives, by a literal reading of Ollama's rules."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from lamina.exporters._ollama import modelfile, template_of
from lamina.testing.tools import tokenizer

CHATML = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<bos>system\nBe brief.<eos>\n' }}{% endif %}"
    "{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
INSIDE = (  # the system text goes into the first prompt
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if loop.index0 == 1 %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}assistant: "
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0]['content'] }}"
)
TALK = [
    {"role": "system", "content": "Answer in verse."}, {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "It scatters."}, {"role": "user", "content": "And at night?"},
]  # fmt: skip


def with_template(text: str | None) -> Any:
    made = tokenizer()
    made.chat_template = text
    return made


def ollama(file: str, messages: list[dict[str, str]]) -> str:
    """A conversation as Ollama renders it: the template once for each turn, the last one without its answer."""
    template = re.search(r'TEMPLATE """(.*?)"""', file, re.DOTALL)
    default = re.search(r'SYSTEM """(.*?)"""', file, re.DOTALL)
    assert template is not None
    system = [m["content"] for m in messages if m["role"] == "system"] or ([default[1]] if default else [])
    turns = [m for m in messages if m["role"] != "system"]
    out = ""
    for place in range(0, len(turns), 2):
        said = {"System": system[0] if system and place == 0 else "", "Prompt": turns[place]["content"]}
        text = template[1]
        for name, value in said.items():
            part = re.search(r"\{\{ if \." + name + r" \}\}(.*?)\{\{ end \}\}", text, re.DOTALL)
            assert part is not None
            body = part[1].replace("{{ ." + name + " }}", value) if value else ""
            text = text[: part.start()] + body + text[part.end() :]
        before, _, behind = text.partition("{{ .Response }}")
        out += before + (turns[place + 1]["content"] + behind if place + 1 < len(turns) else "")
    return out


@pytest.mark.parametrize("text", [CHATML, DEFAULT], ids=["ChatML", "a system text of its own"])
@pytest.mark.parametrize("messages", [TALK, TALK[:2], TALK[1:2], TALK[1:]], ids=["all", "one", "bare", "no system"])
def test_a_template_that_maps_renders_the_same(text: str, messages: list[dict[str, str]]) -> None:
    source = with_template(text)
    file = modelfile("model.gguf", source)
    assert file.startswith("FROM ./model.gguf\n")
    due = source.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ollama(file, messages) == due
    assert 'PARAMETER stop "<eos>"' in file


@pytest.mark.parametrize("text", [INSIDE, NUMBERED, REFUSES, "{{ '{{' }}", None], ids=lambda t: str(t)[:12])
def test_a_template_that_does_not_map_is_left_out(text: str | None) -> None:
    source = with_template(text)
    assert template_of(source) is None
    assert modelfile("x.gguf", source, None, 512) == "FROM ./x.gguf\nPARAMETER num_ctx 512\n"


def test_parameters_are_those_of_the_generation_config() -> None:
    sampled = SimpleNamespace(do_sample=True, temperature=0.6, top_p=0.9, top_k=None, repetition_penalty=1.1)
    file = modelfile("x.gguf", None, sampled, 2048)
    due = {"num_ctx 2048", "temperature 0.6", "top_p 0.9", "repeat_penalty 1.1"}
    assert set(re.findall(r"PARAMETER (.*)", file)) == due
    greedy = SimpleNamespace(do_sample=False, temperature=0.6, repetition_penalty=None)
    assert "temperature" not in modelfile("x.gguf", None, greedy)
