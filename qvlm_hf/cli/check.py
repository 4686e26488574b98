"""`qvlm check DIR`: a model's answers with its cache and without; `--vllm`: will vLLM run it?"""

import argparse

import transformers

from qvlm_hf.cli.loading import load_with_processor, silence
from qvlm_hf.export.vllm_check import DEVICES, VLLM_VERSION, check_for_vllm
from qvlm_hf.hf.runtime.decoding import check_decoding, decoding_problem, probe_inputs
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("directory", metavar="DIR", help="a saved model")
    vllm = f"what qvlm export wrote, against the rules of vLLM {VLLM_VERSION}, instead"
    add("--vllm", action="store_true", help=vllm)
    add("--device", choices=DEVICES, help=f"that vLLM runs on (default: {DEVICES[0]})")
    devices = "devices that share the model in vLLM (default: 1)"
    add("--tensor-parallel", type=int, metavar="N", help=devices)


def run(options: argparse.Namespace) -> int:
    """Runs the command; status 1 if the check fails or a rule is broken."""
    silence()
    if options.vllm:
        return _check_vllm(options)
    if options.device is not None or options.tensor_parallel is not None:
        raise ValueError(
            "--device and --tensor-parallel are of vLLM: give --vllm, or leave them out."
        )
    return _check_decoding(options.directory)


def _check_decoding(directory: str) -> int:
    """Loads the model, with all checks of loading, and decodes with and without a cache."""
    model, processor = load_with_processor(directory)
    if next(quantized_modules(model), None) is None:
        print("note: nothing in this model is quantized by qvlm_hf")
    try:
        check = check_decoding(model, probe_inputs(processor))
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{directory}: a question about a picture cannot be answered ({error}): check that the "
            "processor's files are this model's, or quantize it again."
        ) from error
    problem = decoding_problem(check)
    for part in getattr(model, "stepped_aside", ()):
        print(f"note: {part}: Transformers computes it")
    if problem is not None:
        print(f"error: {problem}")
        return 1
    loads = f"loads with Transformers {transformers.__version__}"
    if check is None:
        reason = "parts are offloaded, or prompts are read in both directions"
        print(f"{loads}; decoding was not checked: {reason}")
    else:
        print(
            f"{loads}; {check.tokens} tokens decoded with a key-value cache as without one "
            f"(KL {max(check.kl, 0):.1g})"
        )
    return 0


def _check_vllm(options: argparse.Namespace) -> int:
    device, devices = options.device or DEVICES[0], options.tensor_parallel or 1
    findings = check_for_vllm(options.directory, device=device, tensor_parallel=devices)
    for finding in findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding.text} ({finding.rule})")
    errors = sum(finding.fatal for finding in findings)
    notes = len(findings) - errors
    print(f"{errors} errors, {notes} notes, by the rules of vLLM {VLLM_VERSION} on {device}")
    return 1 if errors else 0
