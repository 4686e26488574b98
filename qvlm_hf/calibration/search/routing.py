"""What calibration showed the experts of a mixture: token counts, and those that saw too few."""

from collections.abc import Iterable, Sequence

from qvlm_hf.calibration.record.report import RoutingReport
from qvlm_hf.calibration.search.sites import QuantizedSite

__all__ = ["few_tokens_warning", "routing_reports"]

_NAMED = 3  # modules that a warning names; the report names them all


def routing_reports(sites: Iterable[QuantizedSite]) -> list[RoutingReport]:
    """The record of every module of experts among searched sites, by its first projection."""
    reports: dict[str, RoutingReport] = {}
    for site in sites:
        if site.site.experts:
            places = [int(name.rpartition(".")[2]) for name in site.site.modules]
            experts = site.site.name.rsplit(".", 2)[0]
            few = (place for place, part in zip(places, site.parts, strict=True) if part.few_tokens)
            tokens = tuple(part.tokens or 0 for part in site.parts)
            report = RoutingReport(experts=experts, tokens=tokens, few_tokens=tuple(few))
            reports.setdefault(experts, report)
    return list(reports.values())


def few_tokens_warning(reports: Sequence[RoutingReport]) -> str | None:
    """One line that names the experts that saw too few tokens; None if all saw enough."""
    short = [report for report in reports if report.few_tokens]
    if not short:
        return None
    count, total = (
        sum(len(each) for each in column)
        for column in zip(*((r.few_tokens, r.tokens) for r in reports), strict=True)
    )
    named = [f"{r.experts}: {', '.join(map(str, r.few_tokens))}" for r in short[:_NAMED]]
    more = [f"{len(short) - _NAMED} more modules in the report"] * (len(short) > _NAMED)
    return (
        f"{count} of {total} experts saw too few tokens ({'; '.join([*named, *more])}): they have "
        f"the ranges of all experts of their layer and plainly rounded weights. More samples help."
    )
