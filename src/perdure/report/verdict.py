"""What runs show, in a sentence: what each lost of what the model could do before, and what it knows now."""

from __future__ import annotations

from perdure.report.entries import Entry, comparable, mean

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()


def verdict(entries: list[Entry]) -> str:
    """``finetune lost 23 of 69 points of what it could do before and knows 70 % of the eight tasks; …``, of runs that learn
    and whose probe was asked; empty where there is nothing to compare."""
    told = [entry for entry in entries if not entry.reference and not entry.unfinished and lost(entry)]
    if not told or not comparable(entries):
        return ""
    count = len(told[0].tasks)
    tasks = f"the {NUMBERS[count] if count < len(NUMBERS) else count} tasks" if count > 1 else "the task"
    clauses: list[str] = []
    for entry in told:
        knows = mean(entry.accuracy[-1])
        of = f" of {tasks}" if not clauses else ""
        clauses.append(f"{entry.label} {lost(entry)} and knows {knows:.0f} %{of}")
    return "; ".join(clauses) + "."


def lost(entry: Entry) -> str:
    """What the probe says, in whole points; empty: it was not asked."""
    course = entry.course("probe")
    before, after = (course[0], course[-1]) if course else (None, None)
    if before is None or after is None:
        return ""
    points = round(before) - round(after)
    if points < 0:
        return f"gained {-points} points on what it could do before"
    said = f"{points} of {before:.0f} points" if points else "none"
    return f"lost {said} of what it could do before"
