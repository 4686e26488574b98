"""The tables of `qvlm bench`; only ratios of one run are comparable."""

from collections.abc import Iterator, Sequence

from qvlm_hf.bench.kernels import KernelRow
from qvlm_hf.bench.whole_models import ModelRow, Phase

__all__ = ["kernel_table", "model_table"]


def kernel_table(rows: Sequence[KernelRow]) -> Iterator[str]:
    """One line per row; speed against the faster of bfloat16 and float32 at that many tokens."""
    columns = f"{'ms':>9}{'spread':>8}{'against faster':>18}{'of read bandwidth':>19}"
    yield f"{'tokens':>6}  {'':<30}{columns}"
    for row in rows:
        limit = f"{row.bandwidth:.0%}" if row.tokens == 1 else ""
        figures = f"{row.milliseconds:>9.2f}{row.spread:>8.0%}{row.speedup:>17.2f}x{limit:>19}"
        yield f"{row.tokens:>6}  {row.way:<30}{figures}"


def model_table(rows: Sequence[ModelRow]) -> Iterator[str]:
    """A block per batch size; "x" is against the run's baseline, "limit" as in `Phase`."""
    for batch in dict.fromkeys(row.batch for row in rows):
        yield (
            f"{f'batch {batch}':<27}{'first token':^22}  {'prefill of it':^31}  "
            f"{'a token':^38}{'tokens':>8}{'weights':>10}{'peak':>9}"
        )
        yield (
            f"{'':<27}{'ms':>9}{'spread':>7}{'x':>6}  {'ms':>9}{'x':>6}  {'limit':<14}  "
            f"{'ms':>9}{'spread':>7}{'x':>6}  {'limit':<14}"
            f"{'per s':>8}{'MiB':>10}{'MiB':>9}"
        )
        yield from (_line(row) for row in rows if row.batch == batch)


def _line(row: ModelRow) -> str:
    if not (row.first_token and row.prefill and row.decode and row.weight_bytes):
        return f"{row.way:<27}{row.error}"
    first, prefill, decode = row.first_token, row.prefill.time, row.decode.time
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    return (
        f"{row.way:<27}{first.seconds * 1e3:>9.1f}{first.spread:>7.0%}{first.speedup:>6.2f}  "
        f"{prefill.seconds * 1e3:>9.1f}{prefill.speedup:>6.2f}  {_limit(row.prefill):<14}  "
        f"{decode.seconds * 1e3:>9.2f}{decode.spread:>7.0%}{decode.speedup:>6.2f}  "
        f"{_limit(row.decode):<14}"
        f"{row.tokens_per_second:>8.1f}{row.weight_bytes / 2**20:>10.1f}{peak:>9}  "
        f"{row.kernel or ''}".rstrip()
    )


def _limit(phase: Phase) -> str:
    return f"{phase.regime} {phase.of_limit:.0%}"
