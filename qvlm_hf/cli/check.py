"""`qvlm check DIR --vllm`: will vLLM load and run an exported model?"""

import argparse

from qvlm_hf.cli.models import silence
from qvlm_hf.integration.vllm_rules import DEVICES, VLLM_VERSION, check_for_vllm

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("directory", metavar="DIR", help="what qvlm export wrote")
    parser.add_argument("--vllm", action="store_true", required=True, help=f"against the rules of vLLM {VLLM_VERSION}")
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES, help=f"to run on (default: {DEVICES[0]})")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="devices that share the model (default: 1)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; status 1 if a rule is broken."""
    silence()
    findings = check_for_vllm(options.directory, device=options.device, tensor_parallel=options.tensor_parallel)
    for finding in findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding.text} ({finding.rule})")
    errors = sum(finding.fatal for finding in findings)
    print(f"{errors} errors, {len(findings) - errors} notes, by the rules of vLLM {VLLM_VERSION} on {options.device}")
    return 1 if errors else 0
