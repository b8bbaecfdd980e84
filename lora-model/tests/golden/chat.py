"""Writes what Transformers makes of conversations: `chat/` next to this script.

    pip install transformers==5.23.0 tokenizers==0.23.3
    python lora-model/tests/golden/chat.py

    chat/bytes.json, chat/spaces.json    two small tokenizers, learned here: GPT-2's kind and Llama 2's
    chat/golden.json                     templates, conversations, and of each pair text, token ids and the assistant's mask

The templates are written in the manner of those that models come with. Each is rendered twice: as it is, and with
`{% generation %}` blocks in the places of ⟦ and ⟧, which give Transformers' mask of what the assistant says.
"""

import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

OUT = Path(__file__).resolve().parent / "chat"
PINNED = {transformers: "5.23.0", tokenizers: "0.23.3"}

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "[INST]",
    "[/INST]", "<|user|>", "<|assistant|>", "<|system|>",
]
# Added, but not special: it is part of what a model says.
ADDED = ["<think>", "</think>"]

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}⟦{{ message.content }}<|im_end|>⟧{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|header|>system<|/header|>\\n\\n' ~ 'Tools: ' ~ ('none' if tools is none else tools | length) ~ '\\n' }}
{{- system_message }}
{{- '<|eot|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' -}}
        {%- if message.role == 'assistant' -%}
            ⟦{{ message['content'] | trim + '<|eot|>' }}⟧
        {%- else -%}
            {{ message['content'] | trim + '<|eot|>' }}
        {%- endif -%}
    {%- elif message.role == 'tool' %}
        {{- '<|header|>ipython<|/header|>\\n\\n' }}
        {{- {'output': message.content, 'ok': true, 'n': [1, 2.5, none]} | tojson }}
        {{- '<|eot|>' }}
    {%- else %}
        {{- '<|header|>assistant<|/header|>\\n\\n' -}}
        ⟦{{ message.tool_calls[0].function | tojson(indent=2) }}{{ '<|eot|>' }}⟧
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate, beginning with the user") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"].strip() + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" -%}
        ⟦{{ " " + message["content"].strip() + eos_token }}⟧
    {%- endif %}
{%- endfor %}
"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}⟦{{ message['content'] + eos_token }}⟧{{ '' }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

# Thoughts of earlier turns are left out, and the last turn has some even where there are none.
THINKING = """\
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) -%}
            ⟦{{ '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>' }}⟧
        {%- else -%}
            ⟦{{ content + '<|im_end|>' }}⟧
        {%- endif %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# The generation prompt opens thoughts that no turn of the conversation keeps.
OPENED = """\
{{- bos_token }}{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}⟦{{ message.content.split('</think>')[-1] | trim }}</s>⟧
    {%- else %}
        {{- '<|' ~ message.role ~ '|>' ~ message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}
"""

# All of a conversation is closed by a token that is no turn's.
CLOSED = """\
{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role == 'assistant' -%}
⟦{{ message.content + '<|eot|>' }}⟧{{ '\n' }}{% else %}{{ message.content + '<|eot|>\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""

# No token of its own ends a turn.
PLAIN = """\
{% for message in messages %}
{{ message.role | capitalize }}: ⟦{{ message.content if message.role == 'assistant' else message.content | trim }}
⟧{% endfor %}
{% if add_generation_prompt %}
Assistant: {% endif %}
"""
PLAIN = PLAIN.replace("⟦{{", "{% if message.role == 'assistant' %}⟦{{ message.content }}{{ '\\n' }}⟧{% else %}{{").replace(
    "\n⟧{% endfor", "{{ '\\n' }}{% endif %}{% endfor"
)

# Much of Jinja at once.
MUCH = """\
{#- a comment, with {% generation %} in it -#}
{%- macro turn(role, end='<|im_end|>') %}
<|im_start|>{{ role }}
{{ caller() }}{{ end }}
{% endmacro %}
{%- set names = {'user': 'User', 'assistant': 'Helper'} %}
{%- set stop = namespace(seen=0, parts=[]) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if stop.seen >= 7 %}{% break %}{% endif %}
    {%- set stop.seen = stop.seen + 1 %}
    {%- set stop.parts = stop.parts + [message.role | first] %}
    {%- if message.role == 'assistant' -%}
        {{ '<|im_start|>' + names[message.role] + ' ' ~ loop.index ~ loop.cycle('a', 'b') ~ '\\n' }}⟦{% set said = message.content %}{% set stop.said = said | length %}{{ said | trim }}{% if loop.last %}{{ ' ' }}{% endif %}<|im_end|>⟧{{ '\\n' }}
    {%- else %}
        {%- call turn(names.get(message.role, message.role | upper)) %}
            {{- message.content.replace('a', 'A', 1).split() | join(' ') }}
            {{- ' (%s)' | format(message.content | length) }}
            {%- for key, value in message.items() if key not in ['role', 'content'] %} {{ key }}={{ value | tojson }}{% endfor %}
        {%- endcall %}
    {%- endif %}
{%- else %}
nothing
{%- endfor %}
{{- [true, none, 'é', "it's", {'a': 1}] }}
{{- messages | map(attribute='role') | unique | list | tojson(separators=(',', ':')) }}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | tojson(ensure_ascii=true) }}
{{- {'b': [], 'a': {}, 'c': [1, {'d': '<&\\'"'}]} | tojson(indent=2, sort_keys=true) }}
{{- stop.parts | join }}{{ undefined_name }}{{ 'no' if undefined_name else 'yes' }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ true }}{{ none }}
{{- "a.b.c".rsplit('.', 1)[0] }}{{ "x-y".partition('-')[2] }}{{ "prefix".removeprefix('pre') }}{{ "tItle case".title() }}
{%- filter upper %} shout {% endfilter %}
{{- stop.said }}{{ said is defined }}{{ tools is iterable }}{{ tools is none }}{{ 'x' is iterable }}{{ messages is iterable }}
{{- 3 is iterable }}{{ 'x' is sequence }}{{ {} is sequence }}{{ none is sequence }}{{ [1] is sequence }}
{%- if add_generation_prompt %}<|im_start|>Helper
{% endif %}
"""

TEMPLATES = {
    # name: source, tokenizer, bos, eos
    "chatml": (CHATML, "bytes", None, "<|im_end|>"),
    "llama3": (LLAMA3, "bytes", "<|begin|>", "<|eot|>"),
    "mistral": (MISTRAL, "spaces", "<s>", "</s>"),
    "zephyr": (ZEPHYR, "spaces", "<s>", "</s>"),
    "thinking": (THINKING, "bytes", None, "<|im_end|>"),
    "opened": (OPENED, "bytes", "<s>", "</s>"),
    "closed": (CLOSED, "spaces", "<s>", "</s>"),
    "plain": (PLAIN, "bytes", None, "</s>"),
    "much": (MUCH, "spaces", "<s>", "</s>"),
}


def said(*contents, system=None):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


CHATS = [
    said("Where is the tea house?", "Near the mill."),
    said("Hi!", "Hello, what would you like?", "Tea, please.", "Here it is.", "Thanks", "You are welcome!", system="You serve tea."),
    said("Hi", "Ho", system=""),
    said("日本語で？ 👩‍👩‍👧 e\u0301", "はい、お茶です 🙂🙂", "ελληνικά\u00a0; <tag> & 'quote' \"double\"", "Ja, Ærøskøbing 🍵"),
    said("  spaces around \n", "\n two lines\nand spaces  ", "x", " y"),
    said("One", "Two", "Three, without an answer"),
    said("What is 2+2?", "<think>\nTwo and two.\n</think>\n\nFour.", "And 3+3?", "<think>\nSix, surely.\n</think>\n\nSix."),
    said("Forged <|im_end|></s><|eot|> tokens", "are parsed <|im_end|> too"),
    [*said("Again", "Yes"), {"role": "user", "content": "Think", "name": "Ann", "tool_calls": None},
     {"role": "assistant", "content": "Done", "reasoning": "It is <b>late</b>."}],
]
TOOLS = [
    *said("Weather?"),
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Åre"}}}]},
    {"role": "tool", "content": "cold & \"wet\""},
    {"role": "assistant", "content": "Cold."},
]


def learn():
    texts = [m["content"] for chat in CHATS for m in chat if m["content"].isascii()] + ["assistant user system\n\n"] * 3
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 60, initial_alphabet=alphabet, show_progress=False)
    bytes_.train_from_iterator(texts, trainer)

    # SentencePiece's kind, as Llama 2 has it: spaces are letters, what is unknown falls back to bytes.
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.train_from_iterator(texts, trainer)
    model = json.loads(learned.to_str())["model"]
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for token in sorted(model["vocab"], key=model["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) for m in model["merges"]]
    spaces = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces.normalizer = learned.normalizer
    spaces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for name, tokenizer in [("bytes", bytes_), ("spaces", spaces)]:
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
        # One line: what it holds is of no interest to a reader.
        (OUT / f"{name}.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")


def main():
    for module, version in PINNED.items():
        if module.__version__ != version:
            sys.exit(f"{module.__name__} {module.__version__} is installed, the goldens are made with {version}")
    OUT.mkdir(exist_ok=True)
    learn()
    templates, cases = [], []
    for name, (source, tokenizer, bos, eos) in TEMPLATES.items():
        plain = source.replace("⟦", "").replace("⟧", "")
        marked = source.replace("⟦", "{% generation %}").replace("⟧", "{% endgeneration %}")
        tokens = {key: token for key, token in [("bos_token", bos), ("eos_token", eos)] if token}
        templates.append({"name": name, "tokenizer": tokenizer, "tokens": tokens, "plain": plain, "marked": marked})
        tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(OUT / f"{tokenizer}.json"), **tokens)
        for chat in CHATS + ([TOOLS] if name == "llama3" else []):
            case = {"template": name, "messages": chat}
            try:
                out = tok.apply_chat_template(
                    chat, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
                )
            except Exception as e:  # a template's own
                case["error"] = str(e)
                cases.append(case)
                continue
            case["text"] = tok.apply_chat_template(chat, chat_template=plain, tokenize=False)
            assert case["text"] == tok.apply_chat_template(chat, chat_template=marked, tokenize=False), name
            prompt = tok.apply_chat_template(chat, chat_template=plain, tokenize=False, add_generation_prompt=True)
            case["prompt"] = prompt
            case["ids"] = out["input_ids"]
            assert case["ids"] == tok.apply_chat_template(chat, chat_template=plain)["input_ids"]
            # Runs of ones, as from and to.
            mask = [0, *out["assistant_masks"], 0]
            edges = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
            case["turns"] = [list(pair) for pair in zip(edges[::2], edges[1::2])]
            cases.append(case)
    lines = ",\n".join(json.dumps(t, ensure_ascii=False) for t in templates)
    text = '{"templates": [\n' + lines + '\n],\n"cases": [\n'
    text += ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]}\n"
    (OUT / "golden.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
