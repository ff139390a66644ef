"""A tokenizer made in code: one token per character, for runs without any download.

Printable ASCII, newline and tab are single tokens, and so are the four format tags; any other character
becomes U+FFFD, which is one character too, so that character offsets never shift. Chat markup is three role
markers without newlines: `<|system|>...<|user|>...<|assistant|>`, turns of the assistant end in `<|end|>`.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rairl_ray.data.completion_format import TAGS

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
UNKNOWN = "\ufffd"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def character_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Saves with `save_pretrained` and loads with AutoTokenizer; `max_length`: window in tokens."""
    special = [PAD, END, SYSTEM, USER, ASSISTANT]
    characters = string.digits + string.ascii_letters + string.punctuation + " \n\t"
    words = [*special, UNKNOWN, *TAGS, *characters]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tags = "|".join(TAGS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{tags}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    # U+FFFD is deliberately not the wrapper's unk_token: that would make it special, and decoding drops those.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
