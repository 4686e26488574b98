"""`qvlm publish DIR REPO`."""

import argparse

from qvlm_hf.cli.models import silence
from qvlm_hf.hf.publishing import publish_folder
from qvlm_hf.hub.publish import Published

__all__ = ["add_arguments", "describe", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "directory", metavar="DIR", help="a saved quantized model; its README.md is written anew"
    )
    parser.add_argument(
        "repo_id", metavar="REPO", help="where to: owner/name, made where it is missing"
    )
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument(
        "--revision",
        metavar="R",
        help="branch, made where it is missing, or refs/pr/N (default: main)",
    )
    parser.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of writing to main"
    )
    parser.add_argument("--message", dest="commit_message", metavar="M", help="of the commit")
    parser.add_argument(
        "--base-model",
        metavar="ID",
        help="Hub id of the full-precision model (default: what quantizing recorded)",
    )
    parser.add_argument(
        "--license", metavar="L", help="identifier of a licence (default: that of the base model)"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    silence()
    published = publish_folder(
        options.directory,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        base_model=options.base_model,
        license=options.license,
    )
    for line in describe(published):
        print(line)
    return 0


def describe(published: Published) -> list[str]:
    """What is on the Hub now."""
    lines = [
        f"published {len(published.files)} files to {published.repo_id}: "
        f"{published.pull_request_url or published.commit_url}"
    ]
    return lines + ([f"not sent: {', '.join(published.left_out)}"] if published.left_out else [])
