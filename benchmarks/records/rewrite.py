"""Rewrite the pages after a new measurement: what the committed records say gives way to what the files say now."""

import re
import subprocess

from benchmarks.records import ROOT, checked_pages, pattern


def committed(path: str) -> str:
    """A record's text as of HEAD; of a file that is new, its text now."""
    done = subprocess.run(
        ["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else (ROOT / path).read_text()


def typeset(text: str) -> str:
    """As the pages write it: a blank before %, a true minus sign."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", re.sub(r"\s*%", " %", text))


def main() -> None:
    """Rewrite every page that has a module."""
    for page in checked_pages():
        text = page.text
        for claim in page.claims:
            for before, now in zip(claim.rendered(committed), claim.rendered(), strict=True):
                if before != now:
                    text = pattern(before).sub(lambda _, now=now: typeset(now), text)
        if text != page.text:
            page.path.write_text(text)
            print(f"{page.path.relative_to(ROOT)} rewritten")
