"""The lab's tokenizer: every byte encodes, every syllable and every word of the lab is one token.

A Unigram model over GPT-2's byte alphabet: the Viterbi path prefers few long pieces, so " Zomita" becomes " Zo", "mi",
"ta" and any other text falls back to bytes. The id space ends before the embedding does; the mask token lies there.
"""

import re
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgd_lightning.lab.families import ALL_FAMILIES
from dgd_lightning.lab.rows import make_context
from dgd_lightning.lab.world import SYLLABLES

VOCAB_SIZE = 1024  # rows of the embedding
MASK_TOKEN_ID = 1023
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# GPT-2's split without contractions; digits one by one.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHOLE, BYTE = -1.0, -20.0  # log-scores: any whole piece beats any spelling by bytes


@cache  # seconds; the same at every call
def lab_words() -> tuple[str, ...]:
    """All words and marks that the lab's contexts use, with their leading space, names left out; sorted."""
    words: set[str] = set()
    for family in ALL_FAMILIES:
        for seed in range(400):
            context = make_context(seed, family, split="train", size=12, contradict=0.5)
            said = [text for task in context.tasks for text in (task.question, task.answer)]
            for text in (" Tell all you know, and tell it again.", context.system, context.text, *said):
                words.update(re.findall(r" ?[^\W\d_]+| ?[^\w\s]+", text))
    syllables = "|".join(SYLLABLES)
    coined = re.compile(rf" ?(?:{syllables}){{2,3}}", re.IGNORECASE)
    return tuple(sorted(word for word in words if not (coined.fullmatch(word) and word.strip()[0].isupper())))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the lab's tokenizer with its chat template."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    forms = [form for one in SYLLABLES for form in (" " + one.capitalize(), one.capitalize(), one)]
    whole = [*forms, *lab_words(), "system", "user", "assistant", "\n", "\n\n"]
    pieces = dict.fromkeys(pre_tokenizers.ByteLevel.alphabet(), BYTE)
    pieces |= {byte_level.pre_tokenize_str(text)[0][0]: WHOLE for text in whole}
    vocabulary = sorted(pieces.items(), key=lambda item: (item[1] != BYTE, item[0]))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    if tokenizer.get_vocab_size() > MASK_TOKEN_ID:
        raise RuntimeError(f"the lab's vocabulary has {tokenizer.get_vocab_size()} tokens, more than {MASK_TOKEN_ID}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
