"""Formatting numbers for the report."""

NOT_MEASURED = "not measured"


def count(value: float, what: str = "bytes") -> str:
    """Bytes (`12.3 MB`, powers of ten) or seconds (`3.2 s`, `4 min 05 s`)."""
    if what == "seconds":
        if value < 100:
            return f"{value:.1f} s"
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} bytes"


def percent(share: float) -> str:
    """A share as `12.3 %`."""
    return f"{100 * share:.1f} %"


def short(value: float) -> str:
    """Three significant digits, without an exponent if it is readable."""
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.2e}"
