"""`qvlm quantize MODEL --dataset F --output DIR`."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from qvlm_hf.bench.shapes import SHAPES
from qvlm_hf.calibration.process.ranks import is_main
from qvlm_hf.calibration.record.resume import check_resume_dir, remove_state, telling_how_to_go_on
from qvlm_hf.cli.dry_run import check_room, dry_run
from qvlm_hf.cli.loading import (
    add_field_arguments,
    add_scheme_arguments,
    load_model,
    load_processor,
    make_config,
    search_options,
)
from qvlm_hf.cli.processes import joined
from qvlm_hf.cli.publish import describe
from qvlm_hf.cli.story import story
from qvlm_hf.hf.publishing import publish_command, publish_folder
from qvlm_hf.hf.saving import check_output, save_quantized
from qvlm_hf.hub.upload import Target, check_target

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "model", metavar="MODEL", help="directory or Hub id of the full-precision model"
    )
    add_field_arguments(parser, "dataset")
    output = parser.add_argument(
        "--output", required=True, metavar="DIR", help="where to save the result"
    )
    parser.add_argument(
        "--dry-run",
        action=_Optional,
        other=output,
        help="only tell time, memory and disk that it takes, from shapes and a few samples; MODEL "
        f"may also be a config.json or one of {', '.join(SHAPES)}",
    )
    add_scheme_arguments(parser)
    add_field_arguments(
        parser,
        "num_samples",
        "batch_size",
        "max_block_depth",
        "recipe",
        "written_text",
        "rotation",
        "activation_granularity",
        "precision_budget",
        "scratch_dir",
    )
    parser.add_argument(
        "--revision",
        metavar="R",
        help="branch, tag or commit of MODEL on the Hub (default: its main branch)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model (default: auto)",
    )
    add_field_arguments(parser, "modules_to_not_convert")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep finished steps in DIR.resume until the result is saved, and go on with those of "
        "a stopped run",
    )
    parser.add_argument(
        "--push-to-hub",
        dest="repo_id",
        metavar="REPO",
        help="publish the saved result, as qvlm publish does",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to-hub: make a private repository"
    )
    add_field_arguments(parser, "strict")


class _Optional(argparse.Action):
    """A switch that makes another argument optional."""

    def __init__(self, other: argparse.Action, **kwargs: Any) -> None:
        super().__init__(nargs=0, default=False, **kwargs)
        self._other = other

    def __call__(self, _: object, namespace: argparse.Namespace, *__: object) -> None:
        setattr(namespace, self.dest, True)
        self._other.required = False


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.private and options.repo_id is None:
        raise ValueError("--private is of the repository: name it with --push-to-hub REPO.")
    _refuse_unused(options)
    with joined(debug=options.debug) as loading:
        if options.dry_run:
            return dry_run(options) if is_main() else 0
        if is_main():  # the check writes there, which others would see
            check_output(options.output, overwrite=options.overwrite)
        config = make_config(options)
        target = None
        if options.repo_id is not None:
            target = Target(repo_id=options.repo_id, private=options.private or None)
            target = check_target(HfApi(), target)
        state = None
        if options.resume:
            state = check_resume_dir(f"{Path(options.output).resolve()}.resume")
            config.resume_dir = state
        config.processor = processor = load_processor(options.model, options.revision)
        check_room(options, config)
        with telling_how_to_go_on(state):
            model = load_model(options.model, config, options.dtype, options.revision, **loading)
            report = model.hf_quantizer.report
            if is_main():
                with _telling_what_is_lost(state, calibrated=config.dataset is not None):
                    save_quantized(
                        model, processor, options.output, report=report, overwrite=options.overwrite
                    )
    if not is_main():
        return 0
    if state is not None:
        remove_state(state)
    for line in story(report):
        print(line)
    place = shlex.quote(options.output)
    print(f"{len(report.modules)} modules quantized to {options.scheme}; saved in {place}")
    if target is not None:
        _publish(options.output, target)
    return 0


@contextmanager
def _telling_what_is_lost(state: Path | None, *, calibrated: bool) -> Iterator[None]:
    """Inside, a result that cannot be saved, as on a full disk, says what of it is left."""
    try:
        yield
    except OSError as error:
        if not calibrated:
            raise
        kept = f"Finished steps are kept in {state}: run the same again when that is mended."
        lost = "No step of the calibration is kept: run it again with --resume, which keeps them."
        raise OSError(f"{error} {lost if state is None else kept}") from error


def _publish(output: str, target: Target) -> None:
    """Publishes what was saved, and says what may be done where that fails."""
    try:
        published = publish_folder(output, target.repo_id, private=target.private)
    except (ValueError, OSError, RuntimeError) as error:
        raise OSError(f"{error} {publish_command(output, target)}") from error
    for line in describe(published):
        print(line)


def _refuse_unused(options: argparse.Namespace) -> None:
    """An option that would change nothing is an error: whoever gives it expects something of it."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in (*search_options(), "resume")
        if getattr(options, name, None) not in (None, False)
    ]
    if given and options.method == "rtn":
        raise ValueError(
            f"{', '.join(given)}: plain rounding uses no data: leave it out, or leave out --method "
            f"rtn."
        )
    if given and options.dataset is None and not options.dry_run:  # which assumes samples
        raise ValueError(
            f"{', '.join(given)}: is of the search, which needs samples: give --dataset F too, or "
            f"leave it out."
        )
