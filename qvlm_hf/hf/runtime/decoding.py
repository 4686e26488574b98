"""Does a model answer with its key-value cache as it does without one?

A cache that a new Transformers hands over under another name, or a mask that no longer fits, gives
fluent text of another model: nothing raises. So the model decodes the same tokens in both ways, by
Transformers' own `generate`, and the logits are compared.

Both passes leave inputs unrounded and run in float32. Rounding looks at one token and never at a
cache, but a sum in another order puts an input on another level. One such level of a massive
activation moved SmolLM2-135M at W4A4 by .6 nats, as much as a forgotten cache does. Without
rounding it moved by 1e-8.

Left out: models of which parts are offloaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from qvlm_hf.calibration.measure.answers import eval_mode
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.record.report import DecodeCheck
from qvlm_hf.calibration.samples import Sample, collate, moved
from qvlm_hf.errors import one_line
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.processor_fit import sample_of_noise
from qvlm_hf.hf.runtime.fusion import leave_to_transformers
from qvlm_hf.nn.linear import QVLMLinear

__all__ = ["check_decoding", "check_new_model", "decoding_problem", "probe_inputs"]

ModuleState = tuple[QuantScheme, dict[str, Any]]  # scheme and parameters

_TOKENS = 8  # the first one comes from the prompt; the cache makes the others
_NATS = 1e-3  # rounding in float32 gave 1e-8, a forgotten cache .01 and more


@torch.no_grad()
def check_decoding(model: Any, inputs: Mapping[str, Tensor]) -> DecodeCheck | None:
    """Decodes a few tokens greedily with a cache and without one.

    Args:
        model: an image-text-to-text model of Transformers; as it was afterwards.
        inputs: of one prompt without padding, as the processor gives them: input_ids [1, T], ...

    Returns:
        What was compared, to be judged by `decoding_problem`; None where a part is offloaded, and
        where a prompt is read in both directions, so that answers must differ (PaliGemma).
    """
    text = model.config.get_text_config(decoder=True)
    both_ways = getattr(text, "use_bidirectional_attention", None)
    if both_ways or any(parameter.is_meta for parameter in model.parameters()):
        return None
    with _unrounded(model), eval_mode(model):
        fed = moved(inputs, model.device, torch.float32)
        alone, tokens = _decode(model, fed, use_cache=False)
        cached, _ = _decode(model, fed, use_cache=True, tokens=tokens)
    found, expected = (torch.log_softmax(logits, -1) for logits in (cached, alone))
    kl = functional.kl_div(found, expected, reduction="batchmean", log_target=True)
    return DecodeCheck(tokens=len(tokens), kl=float(kl))


def decoding_problem(check: DecodeCheck | None) -> str | None:
    """One line if the difference is more than rounding explains, else None."""
    if check is None or check.kl <= _NATS:
        return None
    return (
        f"with a key-value cache the model answers differently than without one (KL {check.kl:.2g} "
        f"nats over {check.tokens} tokens): Transformers {transformers.__version__} and torch "
        f"{torch.__version__} do not go together with this qvlm_hf: take versions of "
        "docs/compatibility.md, or generate with use_cache=False."
    )


def check_new_model(
    model: Any, sample: Sample, processor: Any
) -> tuple[DecodeCheck | None, str | None]:
    """Checks a new model; parts that plug into Transformers are given up if that mends it.

    Returns:
        The comparison with these parts, and a warning unless all is well.

    Raises:
        RuntimeError: the answers differ all the same; the model is quantized and complete.
    """
    check = None
    try:
        inputs = collate([sample], processor).inputs
        check = check_decoding(model, inputs)
        problem = decoding_problem(check)
        if problem is None:
            return check, None
        leave_to_transformers(model, problem)
        still = decoding_problem(check_decoding(model, inputs))
    except Exception as error:  # of the check alone: it takes no hours of work away
        reason = one_line(error)
        return (
            check,
            f"decoding with a key-value cache was not checked ({reason}): run qvlm check.",
        )
    if still is not None:
        raise RuntimeError(still)
    return check, problem


def probe_inputs(processor: Any) -> dict[str, Tensor]:
    """Inputs of the model: a question about a picture of noise."""
    return collate([sample_of_noise()], processor).inputs


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Inputs unrounded, everything that is not packed in float32; afterwards as it was."""
    tensors: list[tuple[Tensor, Tensor]] = []
    modules: list[tuple[QVLMLinear, ModuleState]] = []
    try:
        for module in model.modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            if isinstance(module, QVLMLinear):
                own = [module.bias]
                modules.append((module, (module.scheme, dict(module._parameters))))
                # of a static range per channel the scale stays: `weight` holds W diag(scale)
                if module.scheme.granularity == "token":
                    module._parameters["input_scale"] = None
                if "input_zero_point" in module._parameters:
                    module._parameters["input_zero_point"] = None
                module.scheme = replace(module.scheme, activation_bits=16, granularity="none")
            for tensor in own:
                if tensor is not None and tensor.is_floating_point():
                    tensors.append((tensor, tensor.data))
                    tensor.data = keep(tensor.data.float())
        yield
    finally:
        for module, (scheme, parameters) in modules:
            module.scheme = scheme
            module._parameters.update(parameters)
        for tensor, data in reversed(tensors):
            tensor.data = data


def _decode(
    model: Any, inputs: Mapping[str, Tensor], *, use_cache: bool, tokens: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Logits [tokens, vocabulary] in float32, and the tokens: the most likely ones, or given."""
    start = inputs["input_ids"].shape[1]
    forced = {}
    if tokens is not None:
        forced["prefix_allowed_tokens_fn"] = lambda _, ids: [tokens[ids.shape[0] - start]]
    # The one model.generation_config fills what is None here: beams, stop strings, time limits.
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        found = model.generate(
            **inputs,
            **forced,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=_TOKENS,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,  # no token ends the text, so nothing is padded
                suppress_tokens=_special_tokens(model.config),
            ),
        )
    finally:
        model.generation_config = own
    return torch.cat(found.logits).float(), found.sequences[0, start:].tolist()


def _special_tokens(config: Any) -> list[int]:
    """Tokens that stand for something else than text: a picture's placeholder without a picture."""
    ends = ("_token_id", "_token_ids", "_index")
    named = [value for name, value in vars(config).items() if name.endswith(ends)]
    lists = (value if isinstance(value, list | tuple) else [value] for value in named)
    return sorted({value for value in chain(*lists) if type(value) is int and value >= 0})
