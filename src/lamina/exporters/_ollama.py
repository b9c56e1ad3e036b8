"""Ollama's Modelfile beside a GGUF file; with a template only where it gives what the chat template gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SYSTEM, USER, ANSWER, AGAIN = "⟦system⟧", "⟦user⟧", "⟦answer⟧", "⟦again⟧"
"""Words that no template holds."""
PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Of a generation config; Ollama calls the last repeat_penalty."""
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around a system text, a prompt and an answer; `default`: the system text where none is given."""

    system: tuple[str, str]
    prompt: tuple[str, str]
    answer: tuple[str, str]
    default: str = ""

    def text(self) -> str:
        """In Ollama's words (Go templates)."""
        parts = (("System", self.system), ("Prompt", self.prompt))
        head = "".join(f"{{{{ if .{name} }}}}{a}{{{{ .{name} }}}}{b}{{{{ end }}}}" for name, (a, b) in parts)
        return f"{head}{self.answer[0]}{{{{ .Response }}}}{self.answer[1]}"

    def rendered(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of a conversation that ends with the user: one turn after the other."""
        system = next((m["content"] for m in messages if m["role"] == "system"), self.default)
        out, turns = "", [m for m in messages if m["role"] != "system"]
        for number, message in enumerate(turns):
            if message["role"] == "user":
                lead = f"{self.system[0]}{system}{self.system[1]}" if system and number == 0 else ""
                out += f"{lead}{self.prompt[0]}{message['content']}{self.prompt[1]}{self.answer[0]}"
            else:
                out += f"{message['content']}{self.answer[1]}"
        return out


def modelfile(file: str, tokenizer: Any, generation: Any = None, context: int | None = None) -> str:
    """FROM, the template if it maps, and what the generation config says; `file` is the GGUF's name."""
    rows = [f"FROM ./{file}"]
    template = template_of(tokenizer)
    if template is not None:
        rows.append(f'TEMPLATE """{template.text()}"""')
        rows += [f'SYSTEM """{template.default}"""'] if template.default else []
        stop = template.answer[1].strip()
        rows += [f"PARAMETER stop {_quoted(stop)}"] if stop else []
    rows += [f"PARAMETER num_ctx {context}"] if context else []
    sampled = bool(getattr(generation, "do_sample", False))
    for name in PARAMETERS:
        value = getattr(generation, name, None)
        if value is not None and (sampled or name == "repetition_penalty"):
            rows.append(f"PARAMETER {name.replace('repetition', 'repeat')} {value}")
    return "\n".join(rows) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def template_of(tokenizer: Any) -> Template | None:
    """The chat template in Ollama's form; None where there is none, or where some conversation comes out otherwise."""
    found = getattr(tokenizer, "chat_template", None)
    if not found or not hasattr(tokenizer, "apply_chat_template"):
        return None
    talk: list[Message] = [
        {"role": "system", "content": SYSTEM}, {"role": "user", "content": USER},
        {"role": "assistant", "content": ANSWER}, {"role": "user", "content": AGAIN},
    ]  # fmt: skip
    try:
        whole, bare = (_said(tokenizer, messages) for messages in (talk, talk[1:2]))
        specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        template = _mapped(whole, bare, specials)
        cases = (talk, talk[:2], talk[1:2], talk[1:])
        same = template is not None and all(template.rendered(c) == _said(tokenizer, c) for c in cases)
    except Exception:  # a template may refuse a conversation, in the words of any library
        return None
    clean = template is not None and "{{" not in _all(template) and '"""' not in _all(template)
    return template if same and clean else None


def _all(template: Template) -> str:
    return "".join((*template.system, *template.prompt, *template.answer, template.default))


def _said(tokenizer: Any, messages: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def _mapped(whole: str, bare: str, specials: Sequence[str]) -> Template | None:
    """Read the pieces off a whole conversation, and one prompt without a system text."""
    if any(word not in whole for word in (SYSTEM, USER, ANSWER, AGAIN)):
        return None
    before, _, rest = whole.partition(SYSTEM)
    middle, _, rest = rest.partition(USER)
    lead, _, rest = rest.partition(ANSWER)
    close, _, tail = rest.partition(AGAIN)
    if tail != lead:
        return None
    end = _ending(_shared(middle, lead), specials)
    if middle != close:
        return None
    head, opening, default = middle[len(end) :], lead[len(end) :], ""
    if bare != f"{head}{USER}{end}{opening}":
        inside, found, _ = bare.partition(f"{end}{head}{USER}")
        if not found or not inside.startswith(before):
            return None
        default = inside[len(before) :]
    return Template(system=(before, end), prompt=(head, end), answer=(opening, end), default=default)


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    return one[
        : next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def _ending(text: str, specials: Sequence[str]) -> str:
    """What ends a turn: the text up to the first special token, and the spaces behind it; nothing without one."""
    places = [(text.index(s) + len(s), s) for s in specials if s and s in text]
    if not places:
        return ""
    stop = min(places)[0]
    while stop < len(text) and text[stop].isspace():
        stop += 1
    return text[:stop]
