"""The processor classes of Transformers: whatever a batch mixes, every row is as it is alone."""

import pytest
import torch
import transformers
from PIL import Image
from shrunken_families import tiny_model
from tiny_families import GRID, WORDS, family_tokenizer, tiny_family, tiny_family_processor
from tiny_models import CHAT_TEMPLATE
from transformers import (
    DeepseekVLImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.calibration.samples import collate, load_samples

# PaliGemma's makes arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SQUARE = {"height": 32, "width": 32}
TILED = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def without_video(kind):
    """The class without a video processor, which needs torchvision."""

    def check(self, name, value):
        return None if value is None else kind.check_argument_for_proper_class(self, name, value)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def with_words(tokenizer, **words):
    """Adds special words, as attributes of the tokenizer too."""
    tokenizer.add_tokens(sorted(words.values()))
    for name, word in words.items():
        setattr(tokenizer, f"{name}_token", word)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(word))
    return tokenizer


def needing_torchvision(name):
    """Image processor and processor of a family that exist with torchvision alone."""
    pytest.importorskip("torchvision")
    return getattr(transformers, f"{name}ImageProcessor"), getattr(transformers, f"{name}Processor")


def paligemma(tokenizer, **_):
    pixels = SiglipImageProcessorPil(size=SQUARE)
    pixels.image_seq_length = 16
    return PaliGemmaProcessor(pixels, tokenizer)


def internvl(tokenizer, **template):
    words = {"start_image": "<img>", "end_image": "</img>", "context_image": "<image>"}
    with_words(tokenizer, **words, video="<video>")
    pixels = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    kind = without_video(InternVLProcessor)
    return kind(pixels, tokenizer, None, image_seq_length=4, **template)


def pixtral(tokenizer, **template):
    pytest.importorskip("torchvision")
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    pixels = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8)
    merged = {"patch_size": 8, "spatial_merge_size": 2}
    return PixtralProcessor(pixels, tokenizer, image_token="<image>", **merged, **template)


def smolvlm(tokenizer, **template):
    pytest.importorskip("num2words")
    pixels, kind = needing_torchvision("SmolVLM")
    with_words(tokenizer, fake_image="<fake>", global_image="<global>", end_of_utterance="<end>")
    tokenizer.add_tokens([f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)])
    frames = transformers.SmolVLMVideoProcessor()
    return kind(pixels(**TILED), tokenizer, frames, image_seq_len=4, **template)


def cohere2_vision(tokenizer, **template):
    pixels, kind = needing_torchvision("Cohere2Vision")
    with_words(tokenizer, boi="<boi>", eoi="<eoi>", img_line_break="<line>", image="<image>")
    return kind(pixels(size=SQUARE, max_patches=4, patch_size=2), tokenizer, **template)


def lfm2_vl(tokenizer, **template):
    pixels, kind = needing_torchvision("Lfm2Vl")
    words = {"image_start": "<start>", "image_end": "<end>", "image_thumbnail": "<thumb>"}
    counts = {"min_image_tokens": 1, "max_image_tokens": 8, "max_num_patches": 32, "tile_size": 32}
    images = pixels(encoder_patch_size=8, downsample_factor=2, do_image_splitting=False, **counts)
    return kind(images, with_words(tokenizer, **words), **template)


def llama4(tokenizer, chat_template):
    pixels, kind = needing_torchvision("Llama4")
    words = ("image", "image_start", "image_end", "tile_x_separator", "tile_y_separator", "patch")
    tokenizer.add_tokens([f"<|{word}|>" for word in words])
    images = pixels(size=SQUARE, max_patches=4, resize_to_max_canvas=False)
    template = chat_template.replace("<image>", "<|image|>")
    return kind(images, tokenizer, patch_size=8, chat_template=template)


def onevision(tokenizer, **template):
    pixels = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID)
    counts = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return without_video(LlavaOnevisionProcessor)(pixels, tokenizer, None, **counts, **template)


def qwen2_vl(tokenizer, chat_template):
    sizes = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    pixels = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, **sizes)
    # neighbouring pictures would be one
    template = {"chat_template": chat_template.replace("<image>", "( <image> )")}
    return without_video(Qwen2VLProcessor)(pixels, tokenizer, None, **template)


# family -> its processor, and the tower and decoder of the model
PROCESSORS = {
    "cohere2_vision": (cohere2_vision, ("siglip", "cohere2")),
    "deepseek_vl": (
        lambda words, **template: DeepseekVLProcessor(
            DeepseekVLImageProcessorPil(size=SQUARE), words, num_image_tokens=16, **template
        ),
        ("siglip", "llama"),
    ),
    "idefics3": (
        lambda words, **template: Idefics3Processor(
            Idefics3ImageProcessorPil(**TILED), words, image_seq_len=4, **template
        ),
        ("idefics3", "llama"),
    ),
    "internvl": (internvl, ("internvl", "qwen2")),
    "lfm2_vl": (lfm2_vl, ("siglip2", "lfm2")),
    "llama4": (llama4, ("llama4", "llama4")),
    "llava_next": (lambda *_, **__: tiny_family_processor("llava_next"), ("clip", "llama")),
    "llava_onevision": (onevision, ("siglip", "qwen2")),
    "mistral3": (pixtral, ("pixtral", "mistral")),
    "paligemma": (paligemma, ("siglip", "gemma")),
    "qwen2_vl": (qwen2_vl, None),
    "smolvlm": (smolvlm, ("smolvlm", "llama")),
}


def picture(width, height, colour="red"):
    return Image.new("RGB", (width, height), colour)


def user(text, *pictures):
    parts = [{"type": "image", "image": one} for one in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def bot(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHATS = {
    "one": [user("what colour ?", picture(32, 32)), bot("red")],
    "wide": [user("what colour ?", picture(64, 32)), bot("the blue square")],
    "two": [user("which is red ?", picture(32, 32), picture(40, 64, "blue")), bot("left")],
    "turns": [
        user("what colour ?", picture(48, 32)), bot("red"),
        user("which shape ?", picture(32, 40, "white")), bot("square"),
    ],
    "later": [user("what ?"), bot("red"), user("which shape ?", picture(32, 40)), bot("square")],
    "text": [user("what is blue ?"), bot("red")],
    "open": [user("what colour ?", picture(64, 64))],
}  # fmt: skip
BATCHES = (["text", "one", "two", "wide"], ["turns", "later", "open"], ["open", "wide"])
ONE_QUESTION = ("one", "wide", "two", "open")  # with pictures, which PaliGemma wants


def samples(names):
    return load_samples([{"messages": CHATS[name]} for name in names])


def made(family):
    make, parts = PROCESSORS[family]
    processor = make(family_tokenizer("<image>"), chat_template=CHAT_TEMPLATE)
    if parts is None:
        model = tiny_model(family)
    else:
        model = tiny_family(family, *parts)
        model.resize_token_embeddings(max(128, len(processor.tokenizer)), mean_resizing=False)
    word = "<|patch|>" if family == "llama4" else "<image>"
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(word)
    return processor, model.eval()


def floats(batch):
    """The inputs; Llama 4's processor makes bfloat16 of pictures."""
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.inputs.items()}


@pytest.mark.parametrize("family", PROCESSORS)
@torch.no_grad()
def test_rows_of_a_batch_are_as_they_are_alone(family):
    processor, model = made(family)
    for names in BATCHES:
        chosen = [n for n in names if family != "paligemma" or n in ONE_QUESTION]
        if not chosen:
            continue
        batch = collate(samples(chosen), processor)
        together = model(**floats(batch)).logits
        for row, name in enumerate(chosen):
            if family == "paligemma" and name == "open":
                continue  # in a batch with answers it ends in an empty one
            alone = collate(samples([name]), processor)
            shown = batch.inputs["attention_mask"][row].bool()
            assert torch.equal(alone.inputs["input_ids"][0], batch.inputs["input_ids"][row][shown])
            logits = model(**floats(alone)).logits[0]
            difference = (together[row][shown] - logits).abs().max()
            assert difference < 1e-5 * logits.abs().max(), name
            answer = CHATS[name][-1]["content"][0]["text"] if name != "open" else ""
            labelled = batch.labels[row][batch.labels[row] >= 0]
            assert processor.tokenizer.decode(labelled) == (f"{answer} </s>" if answer else "")


@torch.no_grad()
def test_of_a_question_and_answer_apart_later_answers_cannot_be_seen():
    """PaliGemma reads a question in both directions and an answer in one."""
    processor, model = made("paligemma")
    batch = collate(samples(["wide"]), processor)
    assert batch.inputs["token_type_ids"].tolist() == (batch.labels >= 0).long().tolist()
    changed = {name: tensor.clone() for name, tensor in batch.inputs.items()}
    changed["input_ids"][0, -1] = WORDS.index("green")
    logits = [model(**inputs).logits[0, :-1] for inputs in (batch.inputs, changed)]
    assert torch.equal(*logits)


def test_what_paligemma_cannot_be_asked_is_one_line():
    processor, _ = made("paligemma")
    with pytest.raises(ValueError, match=r"^dataset\[0\]: has 3 messages before the answer, and P"):
        collate(samples(["turns"]), processor)
    with pytest.raises(ValueError, match=r"^dataset\[0\]: PaliGemmaProcessor refuses[^\n]*$"):
        collate(samples(["text"]), processor)


def test_paligemma_is_calibrated_with_its_own_processor():
    processor, model = made("paligemma")
    rows = [{"messages": CHATS[name]} for name in ("one", "wide", "two", "one")]
    config = QVLMConfig(
        recipe="fixed",
        dataset=rows,
        processor=processor,
        num_samples=4,
        batch_size=2,
        group_size=16,
    )
    report = quantize_model(model, config)
    assert report.self_check.answer_tokens == sum(
        len(processor.tokenizer.tokenize(row["messages"][-1]["content"][0]["text"])) + 1
        for row in rows
    )
    assert not [text for text in report.warnings if "cache" in text]
