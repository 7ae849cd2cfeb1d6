"""Two results against each other: what has become worse for ringfence, beyond what the runs scatter.

A ratio to Envoy has become worse when its median moved the wrong way by more than the two spreads together (most less
least, of both results). Failures that were not there before are a regression however few.
"""

from .figures import MORE_IS_BETTER, OURS, figure, failures, ratio

# Measures by their ratio to Envoy, and those that are ratios of their own.
BY_RATIO = ("cpu", "rate", "p50", "p99", "p999", "connection_bytes", "process_bytes", "growth_bytes", "syscalls")
OWN = ("p99_times",)
ROUNDS_LEAST = 2


def width(spread):
    return spread["max"] - spread["min"]


def regressions(old, new):
    """(what has become worse, what has become better, what cannot be compared), in words."""
    worse, better, missing = [], [], []
    newer = {row["key"]: row for row in new["rows"]}
    for row in old["rows"]:
        other = newer.get(row["key"])
        before, after = row["peers"].get(OURS), other and other["peers"].get(OURS)
        if not before or before["status"] == "n/a":
            continue
        if not after or not after["runs"]:
            missing.append(f"{row['key']}: not in the new result" if not after else f"{row['key']}: {after['reason']}")
            if after and after["status"] == "error" and before["runs"]:
                worse.append(f"{row['key']}: ran before, is an error now")
            continue
        if failures(after) > failures(before):
            worse.append(f"{row['key']}: {failures(after)} failures, {failures(before)} before")
        for measure in (*BY_RATIO, *OWN):
            read = figure if measure in OWN else ratio
            was, now = read(row, OURS, measure), read(other, OURS, measure)
            if not was or not now or (measure == "rate" and row["paced"]):
                continue
            if min(len(before["runs"]), len(after["runs"])) < ROUNDS_LEAST:
                missing.append(f"{row['key']}: {measure}: one round has no spread; run it with --runs {ROUNDS_LEAST} or more")
                continue
            moved = (now["median"] - was["median"]) * (-1 if measure in MORE_IS_BETTER else 1)
            if abs(moved) > width(was) + width(now):
                text = f"{row['key']}: {measure} {now['median']:.3f} ({now['min']:.3f}..{now['max']:.3f}), was {was['median']:.3f} ({was['min']:.3f}..{was['max']:.3f})"
                (worse if moved > 0 else better).append(text)
    return worse, better, missing
