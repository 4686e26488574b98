"""Tokenizer, image processor and chat template of the demo model: small, but ordinary Transformers
files.

The tokenizer knows whole words (`questions.vocabulary`), splits at spaces and punctuation, and
begins every text with `<s>`. The chat template is LLaVA-1.5's:

    USER: <image>
    What color is the object in the top left cell? ASSISTANT: red</s>USER: Is there a red star?
    ASSISTANT: no</s>

A prompt rendered with `add_generation_prompt=True` ends in `ASSISTANT:`; its token ids are a strict
prefix of those of the whole conversation.
"""

import re

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from demo_model.questions import vocabulary
from demo_model.scenes import SIDE

__all__ = ["CHAT_TEMPLATE", "IMAGE_TOKEN", "PATCH", "build_processor", "build_tokenizer"]

PATCH = 8
IMAGE_TOKEN = "<image>"
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] -%}
  {%- else -%}
    {%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + text + '</s>' -}}{%- endgeneration -%}
  {%- elif message['role'] == 'system' -%}
    {{- text + ' ' -}}
  {%- else -%}
    {{- 'USER: ' -}}
    {%- if message['content'] is not string -%}
      {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- endif -%}
    {{- text + ' ' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer; ids are given in order of first appearance in `vocabulary`."""
    words = [
        word
        for text in (*vocabulary(), "USER : ASSISTANT :")
        for word in re.findall(r"\w+|[^\w\s]", text)
    ]
    tokens = list(dict.fromkeys([*_SPECIAL, *words]))
    tokenizer = Tokenizer(
        WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Build the processor: 48x48 pictures, 36 image tokens each, no torchvision needed."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
