"""Chat templates for messages with images, from templates that were written for text alone."""

from __future__ import annotations

import json

from frozenprefix.errors import ConfigError

# Prepended to a template: it turns messages whose content is a list of parts into text with `<image>` marks, the form
# that templates of language models read. The empty expression at the end keeps the template's own first newline.
_PARTS_TO_TEXT = """
{%- set turns = namespace(all=[]) -%}
{%- for message in messages -%}
    {%- set turn = namespace(text='') -%}
    {%- if message.content is string or message.content is none or message.content is undefined -%}
        {%- set turns.all = turns.all + [message] -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type not in ('image', 'text') -%}
                {{- raise_exception("content part: got type '" ~ part.type ~ "', expected 'image' or 'text'") -}}
            {%- endif -%}
            {%- set turn.text = turn.text ~ (MARK if part.type == 'image' else part.text) -%}
        {%- endfor -%}
        {%- set turns.all = turns.all + [dict(message, content=turn.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = turns.all -%}
{{- '' }}"""

# For tokenizers without a template: the prompt that questions were trained with, with the images in front.
_QUESTIONS_AND_ANSWERS = """
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set turn = namespace(images='', text='') -%}
        {%- for part in message.content.split(MARK) -%}
            {%- if not loop.first and turn.text | trim -%}
                {%- set turn.text = turn.text ~ MARK -%}
            {%- elif not loop.first -%}
                {%- set turn.images = turn.images ~ MARK -%}
            {%- endif -%}
            {%- set turn.text = turn.text ~ part -%}
        {%- endfor -%}
        {{- turn.images ~ BEFORE ~ (turn.text | trim) ~ AFTER -}}
    {%- elif message.role == 'assistant' -%}
        {{- GLUE ~ message.content ~ '\n' -}}
    {%- else -%}
        {{- message.content ~ '\n' -}}
    {%- endif -%}
{%- endfor -%}"""


def image_template(chosen: str | None, known: str | dict[str, str] | None, question_prompt: str, mark: str) -> str:
    """A Jinja template that reads messages with images, each of which becomes a `mark` in the text.

    Args:
        chosen: a template, or the name of one of several `known`; None for the default one.
        known: the template of the processor or the tokenizer, or several by name.
        question_prompt: with a place for the {question}; written turn after turn if there is no template.

    Raises:
        ConfigError: for a name that is not known.

    Example:
        >>> image_template("{{ messages[0].content }}", None, "{question}", "<image>").splitlines()[-1]
        "{{- '' }}{{ messages[0].content }}"
    """
    return _with_values(_PARTS_TO_TEXT, MARK=mark) + _text_template(chosen, known, question_prompt, mark)


def _text_template(chosen: str | None, known: str | dict[str, str] | None, question_prompt: str, mark: str) -> str:
    if isinstance(known, dict):
        name = chosen or "default"
        if name in known:
            return known[name]
        if "{" not in name:
            names = ", ".join(sorted(known))
            raise ConfigError(f"chat_template: got {name!r}, expected one of {names}, or a template")
    if chosen or known:
        return str(chosen or known)
    before, _, after = question_prompt.replace(mark, "").partition("{question}")
    glue = "" if after.endswith((" ", "\n")) else " "
    return _with_values(_QUESTIONS_AND_ANSWERS, MARK=mark, BEFORE=before, AFTER=after, GLUE=glue)


def _with_values(template: str, **values: str) -> str:
    """Define variables at the start of a Jinja template. JSON strings are Jinja strings too."""
    names = "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in values.items())
    return names + template
